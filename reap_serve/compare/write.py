"""Puts a report on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reap_serve.compare.latency import Replayed
from reap_serve.compare.page import report_page
from reap_serve.compare.record import Report
from reap_serve.plan.record import Plan
from reap_serve.publish import new_directory
from reap_serve.traffic import benchmark_report


def write_report(
    report: Report,
    output: Path,
    *,
    overwrite: bool,
    plan: Plan | None = None,
    replays: Mapping[str, Sequence[Replayed]] | None = None,
) -> list[Path]:
    """Writes a directory with report.json, report.html and the latency runs, whole or not at all.

    Args:
        report: The comparison.
        output: The directory.
        overwrite: Replace what is there.
        plan: The candidate's plan, to draw.
        replays: Latency runs by side, each exported as a Benchmark Report of llm-d.

    Returns:
        What was written; without report.html where plotly or jinja2 is not installed.

    Raises:
        OutputExistsError: `output` exists and `overwrite` is false.
    """
    with new_directory(output, overwrite=overwrite) as directory:
        written = fill_directory(report, directory, plan=plan)
        for side, runs in (replays or {}).items():
            for run in runs:
                path = directory / f"latency-{side}-{run.schedule.requests}.json"
                benchmark_report.write_report(
                    run.result, run.requests, run.settings, run.schedule, path, overwrite=False, tool=run.tool
                )
                written.append(path)
    return [output / path.relative_to(directory) for path in written]


def fill_directory(report: Report, directory: Path, *, plan: Plan | None = None) -> list[Path]:
    """Writes report.json and report.html into a directory that is there.

    Returns:
        What was written; without report.html where plotly or jinja2 is not installed.
    """
    written = [directory / "report.json"]
    written[0].write_text(report.model_dump_json(indent=2) + "\n")
    page = report_page(report, plan)
    if page is not None:
        written.append(directory / "report.html")
        written[1].write_text(page, encoding="utf-8", errors="backslashreplace")
    return written
