"""Several candidates side by side: quality against bytes, and which of them no other one beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap_serve.compare.plot import COLOURS, DASHES, SYMBOLS, Plot, interval_bars, label, piece
from reap_serve.compare.record import CandidateReport, Report
from reap_serve.compare.section import Cell, Row, Section
from reap_serve.compare.verdict import LIMITS, farthest, judge_slice, worst_level

if TYPE_CHECKING:
    import plotly.graph_objects as go


def candidates_section(report: Report) -> Section | None:
    """The table of the candidates and their plot; None where there is one."""
    if not report.candidates:
        return None
    front = pareto_front(report.candidates)
    notes = [
        "On the front is a candidate that no other beats in both, bytes and the mean divergence of its worst slice.",
    ]
    if any(candidate.virtual for candidate in report.candidates):
        notes.append(
            "Plans were run as masks over the full model in one engine: their quality is that of the checkpoints that "
            "they would make, their bytes are reckoned from the headers of the base's files, and neither latency nor "
            "memory is measured."
        )
    rows = tuple(_row(candidate, candidate.name in front) for candidate in report.candidates)
    return Section("Candidates: quality against size", rows, tuple(notes), tuple(_plots(report, front)))


def pareto_front(candidates: Sequence[CandidateReport]) -> set[str]:
    """Names of those that no other one is smaller than with no more divergence in its worst slice, or the reverse."""
    sized = [(_bytes(entry), worst_divergence(entry), entry.name) for entry in candidates if entry.weights_bytes]
    return {
        name
        for size, divergence, name in sized
        if not any(
            other_size <= size and other <= divergence and (other_size, other) != (size, divergence)
            for other_size, other, _ in sized
        )
    }


def worst_divergence(candidate: CandidateReport) -> float:
    """The mean KL divergence of the slice that has the largest."""
    return max(quality.kl_divergence_mean for quality in candidate.slices.values())


def _bytes(candidate: CandidateReport) -> int:
    assert candidate.weights_bytes is not None
    return candidate.weights_bytes


def _row(candidate: CandidateReport, on_front: bool) -> Row:
    size = "–" if candidate.weights_bytes is None else f"{candidate.weights_bytes / 1e6:,.1f} MB"
    cells = [
        Cell("Experts a layer", "–" if candidate.experts_kept is None else str(candidate.experts_kept)),
        Cell("Weights", size, "on the front" if on_front else ""),
    ]
    for name, quality in candidate.slices.items():
        level = next(
            judgement.level
            for judgement in judge_slice(quality).judgements
            if judgement.limit.name == "kl_divergence_mean"
        )
        low, high = quality.intervals.get("kl_divergence_mean", (quality.kl_divergence_mean,) * 2)
        cells.append(Cell(f"KL, {name}", f"{quality.kl_divergence_mean:.3f}", f"[{low:.3f}, {high:.3f}]", level))
    verdicts = {name: judge_slice(quality) for name, quality in candidate.slices.items()}
    found = farthest(verdicts)
    if found is not None:
        name, worst = found
        value = f"{worst.value:{worst.limit.unit}}, limit {worst.limit.limit:{worst.limit.unit}}"
        cells.append(Cell("Farthest", f"{name}: {worst.limit.figure}", value))
    else:
        cells.append(Cell("Farthest", "none beyond"))
    level = worst_level(verdict.level for verdict in verdicts.values())
    return Row(candidate.name, level, tuple(cells), "Candidate")


def _plots(report: Report, front: set[str]) -> list[Plot]:
    sized = sorted((entry for entry in report.candidates if entry.weights_bytes), key=_bytes)
    if len({entry.weights_bytes for entry in sized}) < 2:
        return []
    import plotly.graph_objects as go

    plot = go.Figure([_line(name, position, sized) for position, name in enumerate(report.slices)])
    chosen = [entry for entry in sized if entry.name in front]
    marker = {"symbol": "circle-open", "size": 18, "color": "#000000", "line": {"width": 1.5}}
    plot.add_trace(
        go.Scatter(
            x=[_bytes(entry) / 1e6 for entry in chosen],
            y=[worst_divergence(entry) for entry in chosen],
            mode="markers",
            name="on the front",
            marker=marker,
        )
    )
    limit = next(limit.limit for limit in LIMITS if limit.name == "kl_divergence_mean")
    plot.add_hline(y=limit, line={"dash": "dash", "color": "#b00000"})
    # On a logarithmic axis an annotation is placed by the exponent, a line by the value.
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": math.log10(limit), "yanchor": "bottom"}
    plot.add_annotation(text=f"limit {limit:g}", showarrow=False, **place)
    if report.memory.base.weights_bytes is not None:
        base = report.memory.base.weights_bytes / 1e6
        plot.add_vline(x=base, line={"dash": "dot", "color": "#595959"}, annotation_text="base")
    plot.update_xaxes(title="weights, MB (10⁶ bytes)")
    plot.update_yaxes(type="log", title="mean KL divergence, nats", exponentformat="power", dtick=1)
    caption = (
        "Each point is a candidate's mean divergence from the base in one slice, with its 95 % interval; to the left "
        "is smaller, below is closer to the base."
    )
    return [Plot(piece(plot, "pareto", 460), caption)]


def _line(name: str, position: int, sized: Sequence[CandidateReport]) -> go.Scatter:
    import plotly.graph_objects as go

    found = [(entry, entry.slices[name]) for entry in sized if entry.slices[name].kl_divergence_mean > 0.0]
    values = [quality.kl_divergence_mean for _, quality in found]
    ends = [
        quality.intervals.get("kl_divergence_mean", (value, value))
        for (_, quality), value in zip(found, values, strict=True)
    ]
    return go.Scatter(
        x=[_bytes(entry) / 1e6 for entry, _ in found],
        y=values,
        name=label(name),
        line={"color": COLOURS[position % len(COLOURS)], "dash": DASHES[position % len(DASHES)]},
        marker={"symbol": SYMBOLS[position % len(SYMBOLS)], "size": 9},
        mode="lines+markers",
        error_y=interval_bars(values, ends) | {"thickness": 1},
    )
