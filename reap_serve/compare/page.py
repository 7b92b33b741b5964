"""report.html: one file that needs no other and asks no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from reap_serve.compare.load_figures import latency_plots, memory_plots
from reap_serve.compare.plot import plotly_script
from reap_serve.compare.quality_figures import quality_plots
from reap_serve.compare.record import Quality, Report, SliceReport
from reap_serve.compare.verdict import LIMITS, Judgement, SliceVerdict, judge_slice, verdict_line
from reap_serve.errors import PlanError
from reap_serve.plan.figure import plan_figure
from reap_serve.plan.record import Plan
from reap_serve.plan.summary import summary_of

# Signs beside the colours: a print in grey says the same.
SIGNS = {"within": "✓", "unclear": "?", "beyond": "▲"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a table.

    Attributes:
        label: Heading of its column.
        text: The figure.
        detail: Its interval, or what it is compared with.
        level: How it is judged; None where there is no limit.
    """

    label: str
    text: str
    detail: str = ""
    level: str | None = None

    @property
    def sign(self) -> str:
        """The level without colour."""
        return SIGNS.get(self.level or "", "")


@dataclass(frozen=True, slots=True)
class Row:
    """One slice in a table."""

    name: str
    level: str
    cells: tuple[Cell, ...]

    @property
    def sign(self) -> str:
        """The level without colour."""
        return SIGNS[self.level]


def report_page(report: Report, plan: Plan | None = None) -> str | None:
    """The page of a report.

    Args:
        report: The comparison.
        plan: The candidate's plan; its saliency and its cut are drawn.

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
        token_rows=[
            Row(name, verdicts[name].level, _token_cells(entry, verdicts[name]))
            for name, entry in report.slices.items()
        ],
        answer_rows=_answer_rows(report, verdicts),
        quality_plots=quality_plots(report),
        latency_plots=latency_plots(report),
        memory_plots=memory_plots(report),
        plan=plan,
        plan_picture=None if plan is None else plan_figure(plan),
        plan_text=None if plan is None else _plan_text(plan),
        plotly=plotly_script(),
    )


def _token_cells(entry: SliceReport, verdict: SliceVerdict) -> tuple[Cell, ...]:
    quality, noise = entry.quality, entry.noise_floor
    levels = {judgement.limit.name: judgement.level for judgement in verdict.judgements}
    floor = "not measured" if noise is None else f"{noise.kl_divergence_mean:.2g}"
    return (
        Cell(
            "KL divergence, mean",
            f"{quality.kl_divergence_mean:.4f}",
            _interval(quality, "kl_divergence_mean", ".4f"),
            levels["kl_divergence_mean"],
        ),
        Cell("of the base twice", floor, "" if noise is None else f"max {noise.kl_divergence_max:.2g}"),
        Cell("KL 99 %", f"{quality.kl_divergence_p99:.3f}", _interval(quality, "kl_divergence_p99", ".3f")),
        Cell(
            "Perplexity ratio",
            f"{quality.perplexity_ratio:.3f}",
            _interval(quality, "perplexity_ratio", ".3f"),
            levels["perplexity_ratio"],
        ),
        Cell("Perplexity", f"{quality.perplexity_base:.3f} → {quality.perplexity_candidate:.3f}"),
        Cell(
            "Same top token",
            f"{quality.same_top_token_fraction:.1%}",
            _interval(quality, "same_top_token_fraction", ".1%"),
        ),
        Cell("RMS Δp", f"{quality.rms_delta_p:.1%}", _interval(quality, "rms_delta_p", ".1%")),
        Cell("Tokens", f"{quality.tokens:,}", f"{quality.requests:,} requests"),
    )


def _answer_rows(report: Report, verdicts: dict[str, SliceVerdict]) -> list[Row]:
    """Shares of greedy answers; a share that no slice has is left out."""
    if not any(entry.quality.answers for entry in report.slices.values()):
        return []
    pairs = [
        (label, name)
        for label, name in (
            ("End in a loop", "loop_fraction"),
            ("Cut at the longest length", "length_limit_fraction"),
            ("Empty", "empty_fraction"),
            ("In another language", "language_switch_fraction"),
            ("Valid JSON", "json_valid_fraction"),
            ("Valid tool calls", "tool_call_valid_fraction"),
        )
        if any(getattr(entry.quality, f"{name}_base") is not None for entry in report.slices.values())
    ]
    return [
        Row(
            name,
            verdicts[name].level,
            (
                Cell("Answers", str(entry.quality.answers)),
                _share(entry.quality, "The same, token for token", "same_answer_fraction"),
                _tokens_before(entry.quality),
                *(_share_pair(entry.quality, label, figure, verdicts[name].judgements) for label, figure in pairs),
            ),
        )
        for name, entry in report.slices.items()
    ]


def _share(quality: Quality, label: str, name: str) -> Cell:
    value = getattr(quality, name)
    return Cell(label, "–") if value is None else Cell(label, f"{value:.0%}", _interval(quality, name, ".0%"))


def _tokens_before(quality: Quality) -> Cell:
    value, name = quality.first_divergence_mean, "first_divergence_mean"
    label = "Tokens before they part"
    return Cell(label, "–") if value is None else Cell(label, f"{value:.1f}", _interval(quality, name, ".1f"))


def _share_pair(quality: Quality, label: str, name: str, judgements: Sequence[Judgement]) -> Cell:
    base, candidate = getattr(quality, f"{name}_base"), getattr(quality, f"{name}_candidate")
    if base is None or candidate is None:
        return Cell(label, "–")
    level = next((judgement.level for judgement in judgements if judgement.limit.name == name), None)
    return Cell(label, f"{base:.0%} → {candidate:.0%}", _interval(quality, f"{name}_candidate", ".0%"), level)


def _interval(quality: Quality, name: str, form: str) -> str:
    ends = quality.intervals.get(name)
    return "" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _plan_text(plan: Plan) -> str:
    kept = sum(len(layer.kept) for layer in plan.layers)
    total = kept + sum(len(layer.dropped) for layer in plan.layers)
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
