"""Puts a report on disk."""

from __future__ import annotations

from pathlib import Path

from reap_serve.compare.record import Report
from reap_serve.publish import new_directory


def write_report(report: Report, output: Path, *, overwrite: bool) -> None:
    """Writes DIR/report.json, the directory whole or not at all.

    Raises:
        OutputExistsError: `output` exists and `overwrite` is false.
    """
    with new_directory(output, overwrite=overwrite) as directory:
        (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
