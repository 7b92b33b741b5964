"""What `reap-serve compare` prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from reap_serve.cli.output import lines, stdout
from reap_serve.compare.record import Quality, Report
from reap_serve.compare.verdict import judge_slice, verdict_line, worst_level


def print_comparison(report: Report) -> None:
    """The verdict, one line a slice, and, where there are any, the candidates and the tasks."""
    stdout.print(verdict_line(report))
    # Two lines a slice: the figures and their intervals fit 80 columns.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_lines=True)
    table.add_column(lines("slice", "tokens"), no_wrap=True)
    for heading in (("KL mean",), ("base", "twice"), ("ppl",), ("ratio",), ("same", "top"), ("loops",), ("verdict",)):
        table.add_column(lines(*heading), justify="right", no_wrap=True)
    for name, entry in report.slices.items():
        quality = entry.quality
        table.add_row(
            lines(name, str(quality.tokens)),
            _with_interval(quality, "kl_divergence_mean", ".3f"),
            "-" if entry.noise_floor is None else f"{entry.noise_floor.kl_divergence_mean:.3f}",
            lines(f"{quality.perplexity_base:.2f}", f"-> {quality.perplexity_candidate:.2f}"),
            _with_interval(quality, "perplexity_ratio", ".2f"),
            f"{quality.same_top_token_fraction:.0%}",
            lines(_share(quality.loop_fraction_base), f"-> {_share(quality.loop_fraction_candidate)}"),
            judge_slice(quality).level,
        )
    stdout.print(table)
    stdout.print(f"{report.candidate} against {report.base}; below a figure its 95 % interval over requests")
    if report.candidates:
        _print_candidates(report)
    if report.tasks:
        _print_tasks(report)


def _print_candidates(report: Report) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("candidate", "experts", "weights MB", *(f"KL {name}" for name in report.slices), "verdict"):
        # Names are not cut: where the terminal is narrow they take several lines.
        table.add_column(heading, justify="left" if heading == "candidate" else "right", overflow="fold")
    for entry in report.candidates:
        levels = [judge_slice(quality).level for quality in entry.slices.values()]
        table.add_row(
            entry.name,
            "-" if entry.experts_kept is None else str(entry.experts_kept),
            "-" if entry.weights_bytes is None else f"{entry.weights_bytes / 1e6:,.1f}",
            *(f"{quality.kl_divergence_mean:.3f}" for quality in entry.slices.values()),
            worst_level(levels),
        )
    stdout.print(table)


def _print_tasks(report: Report) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("task", "metric", "base", "candidate", "recovery %"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task in report.tasks:
        ends = task.recovery_interval
        recovery = "-" if task.recovery_percent is None else f"{task.recovery_percent:.1f}"
        interval = "" if ends is None else f" [{ends[0]:.1f}, {ends[1]:.1f}]"
        table.add_row(task.task, task.metric, f"{task.base:.4f}", f"{task.candidate:.4f}", recovery + interval)
    stdout.print(table)


def _with_interval(quality: Quality, name: str, form: str) -> Text:
    interval = quality.intervals.get(name)
    text = f"{getattr(quality, name):{form}}"
    return lines(text) if interval is None else lines(text, f"{interval[0]:{form}}-{interval[1]:{form}}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
