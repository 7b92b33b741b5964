"""plan.json, report.json and report.html."""

from __future__ import annotations

import numpy as np

from reap_serve.compare.page import report_page
from reap_serve.compare.record import SCHEMA_VERSION as COMPARE_VERSION
from reap_serve.compare.record import (
    CandidateReport,
    LatencySides,
    Memory,
    MemorySides,
    Quality,
    Report,
    SliceReport,
)
from reap_serve.plan.planner import format_plan
from reap_serve.plan.record import Plan
from reap_serve.plan.sizes import CheckpointBytes
from reap_serve.publish import new_directory
from reap_serve.tune.page import tune_sections
from reap_serve.tune.record import TuneReport
from reap_serve.tune.request import TuneRequest
from reap_serve.tune.result import Outcome
from reap_serve.tune.search import Tried


def write_result(
    report: TuneReport, plan: Plan | None, outcome: Outcome, checkpoint: CheckpointBytes, request: TuneRequest
) -> None:
    """Writes the directory, whole or not at all; without report.html where plotly or jinja2 is not installed.

    Raises:
        OutputExistsError: The output exists and is not to be replaced.
        StorageError: The disk refused.
    """
    shown = outcome.best or outcome.below
    with new_directory(request.output, overwrite=request.overwrite) as directory:
        if plan is not None:
            (directory / "plan.json").write_bytes(format_plan(plan))
        (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
        if shown is None:
            return
        page = report_page(_comparison(report, shown, outcome, checkpoint), plan, tune_sections(report))
        if page is not None:
            (directory / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def _comparison(report: TuneReport, shown: Tried, outcome: Outcome, checkpoint: CheckpointBytes) -> Report:
    """The held-out figures of one plan and the front of all, as a comparison."""
    of_base, of_plan = (
        Memory(weights_bytes=checkpoint.at_uniform(count), kv_cache_tokens=None, start_seconds=None)
        for count in (report.num_experts, shown.candidate.keep_experts)
    )
    return Report(
        schema_version=COMPARE_VERSION,
        provenance=report.provenance,
        base=report.model,
        candidate=_name(shown),
        too_long=0,
        slices={name: SliceReport(quality=entry) for name, entry in shown.slices.items()},
        latency=LatencySides(base=None, candidate=None),
        memory=MemorySides(base=of_base, candidate=of_plan),
        candidates=tuple(
            CandidateReport(
                name=_name(tried),
                virtual=True,
                experts_kept=tried.candidate.keep_experts,
                weights_bytes=checkpoint.at(np.asarray(tried.candidate.decision.count_by_layer())),
                slices=_slices(tried),
            )
            for tried in outcome.tried
        ),
    )


def _slices(tried: Tried) -> dict[str, Quality]:
    return dict(tried.slices)


def _name(tried: Tried) -> str:
    where = "" if tried.part == "selection" else ", held-out"
    return f"{tried.candidate.keep_experts} by {tried.candidate.rule.name}{where}"
