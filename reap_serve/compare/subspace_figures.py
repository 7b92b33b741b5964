"""The functional subspace as a section of the report: figures by layer and model, and what they show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reap_serve.compare.plot import Plot, label, piece
from reap_serve.compare.record import Report
from reap_serve.compare.section import Cell, Row, Section
from reap_serve.compare.subspace import ORIGINAL, LayerSubspace, Subspace

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_LAYERS_DRAWN = 4
# Colours that people with any colour vision tell apart, with a symbol each for prints in grey.
_STYLES = (
    ("#9a9a9a", "circle-open"),
    ("#0072b2", "circle"),
    ("#d55e00", "x"),
    ("#009e73", "diamond"),
    ("#cc79a7", "square"),
    ("#56b4e9", "triangle-up"),
)


def subspace_section(report: Report) -> Section | None:
    """The section; None without an analysis."""
    subspace = report.subspace
    if subspace is None:
        return None
    names = [model.name for model in subspace.layers[0].models]
    notes = [
        "Points are the experts' mean outputs over the tokens routed to them, observed in each model on the same "
        f"traffic and projected on the first two principal components of the {ORIGINAL}'s. Spread is the mean squared "
        f"distance of the mean outputs from their middle, over all dimensions and relative to the {ORIGINAL}. "
        "Directions is the participation ratio of their covariance, (sum of eigenvalues)² / sum of squared "
        "eigenvalues. A spread below 1: the mean outputs have drawn together (arXiv 2510.13999). Some of that comes "
        "with pruning, too, since the experts that stay get the tokens of the others; what merging adds stands beside."
    ]
    plots = [_points(subspace)]
    if subspace.bounds:
        notes.append(
            "For a merged pair i, j with gates g and r = g_i / (g_i + g_j), the error that no merged expert can undo "
            "is at least about E[(g_i + g_j)²] · Var[r] · ‖f_i − f_j‖². It is an estimate from means: where gates and "
            "outputs depend on each other, the measured error of the best fixed mixture may lie below it."
        )
        plots.append(_bounds(subspace))
    return Section(
        "Functional subspace: what the experts can say",
        tuple(_row(layer, names) for layer in subspace.layers),
        tuple(notes),
        tuple(plots),
    )


def _row(layer: LayerSubspace, names: list[str]) -> Row:
    original = layer.models[0]
    cells = [Cell(f"{ORIGINAL}: directions", f"{original.participation:.1f}", f"{len(original.points)} experts")]
    for name, model in zip(names[1:], layer.models[1:], strict=True):
        cells.append(
            Cell(
                f"{name}: spread",
                f"{model.spread / original.spread:.2f}",
                f"{model.participation:.1f} directions, {len(model.points)} experts",
            )
        )
    return Row(str(layer.index), None, tuple(cells), group="Layer")


def drawn_layers(num_layers: int) -> list[int]:
    """Positions of the layers that are drawn: spread evenly, the first and the last among them."""
    count = min(num_layers, MAX_LAYERS_DRAWN)
    return sorted({round(position * (num_layers - 1) / max(count - 1, 1)) for position in range(count)})


def _points(subspace: Subspace) -> Plot:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    drawn = [subspace.layers[position] for position in drawn_layers(len(subspace.layers))]
    columns = min(len(drawn), 2)
    rows = math.ceil(len(drawn) / columns)
    figure: go.Figure = make_subplots(rows, columns, vertical_spacing=0.12)
    for position, layer in enumerate(drawn):
        for number, model in enumerate(layer.models):
            colour, symbol = _STYLES[number % len(_STYLES)]
            figure.add_trace(
                go.Scatter(
                    x=[first for first, _ in model.points],
                    y=[second for _, second in model.points],
                    mode="markers",
                    name=label(model.name),
                    legendgroup=model.name,
                    showlegend=position == 0,
                    marker={"color": colour, "symbol": symbol, "size": 11 if number == 0 else 7},
                ),
                row=position // columns + 1,
                col=position % columns + 1,
            )
        title = f"layer {layer.index}: {sum(layer.explained):.0%} of the variance"
        figure.update_xaxes(title=title, row=position // columns + 1, col=position % columns + 1)
    return Plot(
        piece(figure, "subspace-points", 320 * rows + 60),
        "Experts on the original's first (across) and second principal component, layers spread over the depth.",
    )


def _bounds(subspace: Subspace) -> Plot:
    import plotly.graph_objects as go

    figure = go.Figure()
    kinds = (("best fixed mixture", "ideal"), ("merged expert", "measured"), ("pruned instead", "pruned"))
    for number, (name, field) in enumerate(kinds, start=1):
        colour, symbol = _STYLES[number]
        figure.add_trace(
            go.Scatter(
                x=[bound.bound for bound in subspace.bounds],
                y=[getattr(bound, field) for bound in subspace.bounds],
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 8},
                text=[
                    f"layer {bound.layer}, experts {bound.experts[0]} and {bound.experts[1]}"
                    for bound in subspace.bounds
                ],
            )
        )
    values = [value for bound in subspace.bounds for value in (bound.bound, bound.ideal, bound.measured) if value > 0]
    ends = [min(values), max(values)]
    figure.add_trace(
        go.Scatter(x=ends, y=ends, mode="lines", name="equal", line={"color": "#000000", "dash": "dot", "width": 1})
    )
    figure.update_xaxes(type="log", title="estimated bound", dtick="D2")
    figure.update_yaxes(type="log", title="measured error", dtick="D2")
    return Plot(
        piece(figure, "subspace-bounds", 420),
        "Mean squared error of a layer's output for merged pairs of experts, against the estimated bound.",
    )
