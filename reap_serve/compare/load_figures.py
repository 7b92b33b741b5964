"""The plots of latency, throughput and memory of a report, as pieces of HTML that need plotly.js on their page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from reap_serve.compare.plot import BASE_COLOUR, CANDIDATE_COLOUR, Plot, piece
from reap_serve.compare.record import LatencyReport, Memory, Report
from reap_serve.traffic.latency import Distribution

if TYPE_CHECKING:
    import plotly.graph_objects as go


def latency_plots(report: Report) -> list[Plot]:
    """Percentiles of the four times at the first concurrency, and throughput by concurrency where there are several."""
    latency = report.latency
    if latency.base is None or latency.candidate is None:
        return []
    kinds: list[tuple[str, str, str, Callable[[LatencyReport], Distribution | None]]] = [
        ("ttft", "Time to first token", "first piece of the answer - start", lambda side: side.latency.ttft),
        ("itl", "Inter-token latency", "a piece - the piece before", lambda side: side.latency.itl),
        ("tpot", "Time per output token", "(E2E - TTFT) / (tokens - 1)", lambda side: side.latency.tpot),
        ("e2e", "End to end (E2E)", "last piece - start", lambda side: side.latency.e2e),
    ]
    plots = []
    for name, title, formula, of in kinds:
        base, candidate = of(latency.base), of(latency.candidate)
        if base is not None and candidate is not None:
            plots.append(Plot(_percentiles(name, title, base, candidate), formula))
    if len(latency.levels) > 1:
        levels = [level.concurrency for level in latency.levels]
        tokens = {
            "base": [level.base.output_tokens_per_second for level in latency.levels],
            "candidate": [level.candidate.output_tokens_per_second for level in latency.levels],
        }
        plots.append(
            Plot(_curve("throughput", "Output tokens a second", levels, tokens), "tokens of all answers / seconds")
        )
        good = {
            "base": [level.base.goodput_requests_per_second for level in latency.levels],
            "candidate": [level.candidate.goodput_requests_per_second for level in latency.levels],
        }
        if good["base"][0] is not None:
            plots.append(
                Plot(
                    _curve("goodput", "Good requests a second", levels, good),
                    "requests within every objective / seconds",
                )
            )
    return plots


def memory_plots(report: Report) -> list[Plot]:
    """Bars of what both models take and hold."""
    kinds: list[tuple[str, str, str, Callable[[Memory], float | None]]] = [
        ("weights", "Weights, bytes", "of the checkpoint's files", lambda side: side.weights_bytes),
        ("kv-cache", "KV cache, tokens", "as the engine reports", lambda side: side.kv_cache_tokens),
        (
            "kv-sequences",
            "Sequences of full length",
            "that fit the KV cache at once",
            lambda side: side.kv_cache_max_concurrency,
        ),
        (
            "resident",
            "Host memory at most, bytes",
            "proportional set size of the server's processes",
            lambda side: side.peak_resident_bytes,
        ),
        ("start", "Start, seconds", "from the start of the server until it answers", lambda side: side.start_seconds),
    ]
    plots = []
    for name, title, formula, of in kinds:
        base, candidate = of(report.memory.base), of(report.memory.candidate)
        if base is not None and candidate is not None:
            plots.append(Plot(_pair(name, title, base, candidate), formula))
    return plots


def _percentiles(name: str, title: str, base: Distribution, candidate: Distribution) -> str:
    import plotly.graph_objects as go

    keys = ("p50", "p90", "p99")
    bars = [
        _bar(side, list(keys), [1000.0 * getattr(times, key) for key in keys])
        for side, times in (("base", base), ("candidate", candidate))
    ]
    plot = go.Figure(bars)
    plot.update_layout(title=title, barmode="group")
    plot.update_yaxes(title="milliseconds")
    return piece(plot, f"latency-{name}", 320)


def _pair(name: str, title: str, base: float, candidate: float) -> str:
    import plotly.graph_objects as go

    plot = go.Figure([_bar("base", ["base"], [base]), _bar("candidate", ["candidate"], [candidate])])
    plot.update_layout(title=title, showlegend=False)
    return piece(plot, f"memory-{name}", 280)


def _bar(side: str, labels: Sequence[str], values: Sequence[float]) -> go.Bar:
    import plotly.graph_objects as go

    return go.Bar(
        name=side,
        x=labels,
        y=values,
        text=[_short(value) for value in values],
        textposition="outside",
        cliponaxis=False,
        marker={
            "color": BASE_COLOUR if side == "base" else CANDIDATE_COLOUR,
            "pattern": {"shape": "/" if side == "base" else "", "fgcolor": "#ffffff"},
        },
    )


def _short(value: float) -> str:
    """Three digits, with k, M, G for powers of 1000."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 999.5 or unit == " G":
            break
        value /= 1000.0
    return f"{value:.3g}{unit}"


def _curve(name: str, title: str, levels: Sequence[int], sides: Mapping[str, Sequence[float | None]]) -> str:
    import plotly.graph_objects as go

    plot = go.Figure(
        [
            go.Scatter(
                x=levels,
                y=values,
                name=side,
                line={
                    "color": BASE_COLOUR if side == "base" else CANDIDATE_COLOUR,
                    "dash": "dash" if side == "base" else "solid",
                },
                marker={"symbol": "square" if side == "base" else "circle", "size": 9},
            )
            for side, values in sides.items()
        ]
    )
    plot.update_layout(title=title)
    plot.update_xaxes(title="requests under way at once", tickvals=list(levels))
    plot.update_yaxes(rangemode="tozero")
    return piece(plot, f"curve-{name}", 320)
