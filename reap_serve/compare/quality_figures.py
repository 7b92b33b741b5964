"""The plots of quality of a report, as pieces of HTML that need plotly.js on their page."""

from __future__ import annotations

from reap_serve.compare.plot import (
    CANDIDATE_COLOUR,
    COLOURS,
    DASHES,
    NOISE_COLOUR,
    SYMBOLS,
    Plot,
    interval_bars,
    label,
    piece,
)
from reap_serve.compare.record import Quality, Report
from reap_serve.compare.verdict import LIMITS

_QUANTILES = {
    "median": "kl_divergence_median",
    "90 %": "kl_divergence_p90",
    "99 %": "kl_divergence_p99",
    "99.9 %": "kl_divergence_p999",
    "max": "kl_divergence_max",
}


def quality_plots(report: Report) -> list[Plot]:
    """Divergence and perplexity ratio of each slice with their intervals, and the quantiles of divergence."""
    return [
        Plot(
            _by_slice("kl-by-slice", report, "kl_divergence_mean", "mean KL divergence, nats", 0),
            "KL(base || candidate) = Σ p log(p/q) per token of the recorded answers, over the 20 likeliest tokens of "
            "both models, the recorded token and one cell for all others: a lower bound. Bars: 95 % intervals.",
        ),
        Plot(
            _by_slice("perplexity-by-slice", report, "perplexity_ratio", "perplexity, candidate / base", 1),
            "Perplexity = exp(-mean log p) over the tokens of the recorded answers. Bars: 95 % intervals.",
        ),
        Plot(
            _quantiles(report),
            "Quantiles of the divergence over tokens. Where a line rises late, few tokens are damaged, and those much; "
            "the largest value grows with the number of tokens.",
        ),
    ]


def _by_slice(name: str, report: Report, figure: str, title: str, reference: float) -> str:
    import plotly.graph_objects as go

    limit = next(limit.limit for limit in LIMITS if limit.name == figure)
    slices = list(report.slices)
    values = [getattr(report.slices[key].quality, figure) for key in slices]
    ends = [_ends(report.slices[key].quality, figure) for key in slices]
    labels = [label(key) for key in slices]
    traces = [
        go.Scatter(
            x=values,
            y=labels,
            mode="markers",
            name="candidate",
            marker={"color": CANDIDATE_COLOUR, "size": 10},
            error_x=interval_bars(values, ends),
        )
    ]
    noise = [report.slices[key].noise_floor for key in slices]
    if all(noise):
        marker = {"color": NOISE_COLOUR, "symbol": "line-ns-open", "size": 14}
        floor = [getattr(entry, figure) for entry in noise]
        traces.append(go.Scatter(x=floor, y=labels, mode="markers", name="base twice", marker=marker))
    plot = go.Figure(traces)
    plot.add_vline(x=limit, line={"dash": "dash", "color": "#b00000"}, annotation_text=f"limit {limit:g}")
    plot.update_xaxes(title=title, rangemode="tozero" if reference == 0 else "normal")
    plot.update_yaxes(autorange="reversed", automargin=True)
    return piece(plot, name, 110 + 34 * len(slices))


def _ends(quality: Quality, figure: str) -> tuple[float, float]:
    value = getattr(quality, figure)
    return quality.intervals.get(figure, (value, value))


def _quantiles(report: Report) -> str:
    import plotly.graph_objects as go

    traces = []
    for number, (key, entry) in enumerate(report.slices.items()):
        colour = COLOURS[number % len(COLOURS)]
        traces.append(
            go.Scatter(
                x=list(_QUANTILES),
                y=[_positive(getattr(entry.quality, figure)) for figure in _QUANTILES.values()],
                name=label(key),
                line={"color": colour, "dash": DASHES[number % len(DASHES)]},
                marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9},
            )
        )
    noise = [entry.noise_floor for entry in report.slices.values() if entry.noise_floor is not None]
    if noise:
        worst = [max(getattr(entry, figure) for entry in noise) for figure in _QUANTILES.values()]
        traces.append(
            go.Scatter(
                x=list(_QUANTILES),
                y=[_positive(value) for value in worst],
                name="base twice, worst slice",
                line={"color": NOISE_COLOUR, "width": 1, "dash": "dot"},
                marker={"symbol": "line-ew-open", "size": 9},
            )
        )
    plot = go.Figure(traces)
    plot.update_yaxes(type="log", title="KL divergence, nats", exponentformat="power", dtick=1)
    return piece(plot, "kl-quantiles", 420)


def _positive(value: float) -> float | None:
    """What a logarithmic axis can show."""
    return value if value > 0 else None
