"""The plots of latency, throughput and memory of a report, as pieces of HTML that need plotly.js on their page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from reap_serve.compare.plot import BASE_COLOUR, CANDIDATE_COLOUR, Plot, piece
from reap_serve.compare.record import ConcurrencyLevel, LatencyReport, Memory, Report
from reap_serve.traffic.latency import Distribution

if TYPE_CHECKING:
    import plotly.graph_objects as go


_TIMES: tuple[tuple[str, str, str, Callable[[LatencyReport], Distribution | None]], ...] = (
    ("ttft", "Time to first token", "first piece of the answer - start", lambda side: side.latency.ttft),
    ("itl", "Inter-token latency", "a piece - the piece before", lambda side: side.latency.itl),
    ("tpot", "Time per output token", "(E2E - TTFT) / (tokens - 1)", lambda side: side.latency.tpot),
    ("e2e", "End to end (E2E)", "last piece - start", lambda side: side.latency.e2e),
)


def latency_plots(report: Report) -> list[Plot]:
    """Percentiles of the four times at the first concurrency, and throughput by concurrency where there are several."""
    latency = report.latency
    if latency.base is None or latency.candidate is None:
        return []
    plots = []
    for name, title, formula, of in _TIMES:
        base, candidate = of(latency.base), of(latency.candidate)
        if base is not None and candidate is not None:
            plots.append(Plot(_percentiles(name, title, base, candidate), formula))
    if len(latency.levels) > 1:
        plots += _time_curves(latency.levels)
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


def _time_curves(levels: Sequence[ConcurrencyLevel]) -> list[Plot]:
    """Median and 99 % of each time by concurrency; of the levels where both models have it."""
    plots = []
    for name, title, formula, of in _TIMES:
        found = [
            (level.concurrency, base, candidate)
            for level in levels
            if (base := of(level.base)) is not None and (candidate := of(level.candidate)) is not None
        ]
        curves = {
            f"{side}, {part}": [1000.0 * getattr(entry[1 + position], key) for entry in found]
            for position, side in enumerate(("base", "candidate"))
            for part, key in (("median", "p50"), ("99 %", "p99"))
        }
        if len(found) > 1:
            picture = _curve(f"{name}-by-load", f"{title}, ms", [entry[0] for entry in found], curves)
            plots.append(Plot(picture, formula))
    return plots


def memory_note(report: Report) -> str:
    """What both models were given the same of."""
    budget = report.memory.budget
    if budget is None and report.candidates and report.candidates[0].virtual:
        return "The candidate was a mask over the base: its bytes are reckoned, and it takes no memory of its own."
    if budget is None:
        return "Both models were served with the same options; neither a memory budget nor a KV cache was set for them."
    size = f"{budget.size_bytes:,} bytes"
    if budget.same == "memory":
        return (
            f"The same memory for both: weights + KV cache = {size}. KV cache = that - the bytes of the weights, so "
            "what the weights lose, the KV cache gains."
        )
    return f"The same KV cache for both: {size}. What the weights lose is memory that is not taken."


def memory_plots(report: Report) -> list[Plot]:
    """Bars of what both models take and hold."""
    kinds: list[tuple[str, str, str, Callable[[Memory], float | None]]] = [
        ("weights", "Weights, bytes", "of the checkpoint's files", lambda side: side.weights_bytes),
        (
            "weights-resident",
            "Weights on a device, bytes",
            "what loading them took, as vLLM's log says it",
            lambda side: side.weights_resident_bytes,
        ),
        ("kv-bytes", "KV cache, bytes", "as the mode above gives it", lambda side: side.kv_cache_bytes),
        ("kv-cache", "KV cache, tokens", "as the engine reports", lambda side: side.kv_cache_tokens),
        (
            "kv-sequences",
            "Sequences of full length",
            "that fit the KV cache at once",
            lambda side: side.kv_cache_max_concurrency,
        ),
        (
            "resident-start",
            "Host memory once it answers, bytes",
            "proportional set size of the server's processes",
            lambda side: side.resident_bytes,
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


def _curve(name: str, title: str, levels: Sequence[int], curves: Mapping[str, Sequence[float | None]]) -> str:
    """Curves over concurrency; the name of each begins with its side, and what follows sets it apart."""
    import plotly.graph_objects as go

    traces = []
    for curve, values in curves.items():
        of_base, second = curve.startswith("base"), curve.endswith("99 %")
        traces.append(
            go.Scatter(
                x=levels,
                y=values,
                name=curve,
                line={
                    "color": BASE_COLOUR if of_base else CANDIDATE_COLOUR,
                    "dash": "dash" if of_base else "solid",
                    "width": 1 if second else 2,
                },
                marker={
                    "symbol": ("square" if of_base else "circle") + ("-open" if second else ""),
                    "size": 9,
                },
            )
        )
    plot = go.Figure(traces)
    plot.update_layout(title=title)
    plot.update_xaxes(title="requests under way at once", tickvals=list(levels))
    plot.update_yaxes(rangemode="tozero")
    return piece(plot, f"curve-{name}", 320 if len(curves) == 2 else 390)
