"""report.html: one file that needs no other and asks no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from importlib import resources

from reap_serve.compare.candidate_figures import candidates_section
from reap_serve.compare.load_figures import latency_plots, memory_note, memory_plots
from reap_serve.compare.plot import plotly_script
from reap_serve.compare.quality_figures import quality_plots
from reap_serve.compare.record import Report
from reap_serve.compare.section import SIGNS, Section
from reap_serve.compare.slice_tables import answer_rows, few_requests_note, llama_cpp_section, token_rows
from reap_serve.compare.subspace_figures import subspace_section
from reap_serve.compare.task_figures import tasks_section
from reap_serve.compare.verdict import LIMITS, judge_slice, verdict_line
from reap_serve.errors import PlanError
from reap_serve.plan.figure import plan_figure
from reap_serve.plan.record import Plan
from reap_serve.plan.summary import summary_of

# Sections behind those that every report has, in the order of the page; each gives None where it has nothing to show.
SECTIONS: tuple[Callable[[Report], Section | None], ...] = (
    candidates_section,
    tasks_section,
    subspace_section,
    llama_cpp_section,
)


def report_page(report: Report, plan: Plan | None = None, first: Sequence[Section] = ()) -> str | None:
    """The page of a report.

    Args:
        report: The comparison.
        plan: The candidate's plan; its saliency and what it keeps are drawn.
        first: Sections of a later stage, before all that are optional.

    Returns:
        HTML; None where plotly or jinja2 is not installed.
    """
    if not all(importlib.util.find_spec(name) for name in ("plotly", "jinja2")):
        return None
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files("reap_serve.compare").joinpath("page.html.j2").read_text(encoding="utf-8")
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(source)
    template.globals["markup"] = Markup
    verdicts = {name: judge_slice(entry.quality) for name, entry in report.slices.items()}
    levels = [verdict.level for verdict in verdicts.values()]
    return template.render(
        report=report,
        signs=SIGNS,
        verdict=verdict_line(report),
        level=next(level for level in reversed(SIGNS) if level in levels),
        limits=LIMITS,
        token_rows=token_rows(report, verdicts),
        answer_rows=answer_rows(report, verdicts),
        few_requests=few_requests_note(report),
        quality_plots=quality_plots(report),
        latency_plots=latency_plots(report),
        memory_plots=memory_plots(report),
        has_noise=any(entry.noise_floor is not None for entry in report.slices.values()),
        memory_note=memory_note(report),
        sections=[*first, *(section for build in SECTIONS if (section := build(report)) is not None)],
        plan=plan,
        plan_picture=None if plan is None else plan_figure(plan),
        plan_text=None if plan is None else _plan_text(plan),
        plotly=plotly_script(),
    )


def _plan_text(plan: Plan) -> str:
    kept = sum(len(layer.kept) for layer in plan.layers)
    total = sum(layer.num_experts for layer in plan.layers)
    text = f"The plan keeps {kept} of {total} experts in {len(plan.layers)} layers, by {plan.criterion}."
    try:
        retained = summary_of(plan).retained_saliency
    except PlanError:
        return f"{text} It carries no predictions."
    shares = ", ".join(f"{name} {share:.1%}" for name, share in retained.slices.items())
    return (
        f"{text} Retained saliency (sum of {retained.criterion} over the kept experts / over all, mean over layers): "
        f"{retained.mixture:.1%} on the mixture; {shares}."
    )
