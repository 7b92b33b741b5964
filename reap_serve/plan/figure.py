"""A plan as one SVG picture, written without a plotting library so that it can stand in any report.

Three panels: saliency of every expert by layer and rank, with what is dropped in another colour; retained saliency by
layer; overlap between the plans that each slice would make for itself. A plan written by hand has the first panel only.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from reap_serve.errors import PlanError
from reap_serve.plan.record import Plan, PlanLayer
from reap_serve.plan.summary import Summary, summary_of

WIDTH = 960
LEFT = 64
PLOT_WIDTH = WIDTH - LEFT - 150
ROW_HEIGHT_LIMITS = (4, 16)
MAP_HEIGHT = 420
LINES_HEIGHT = 200
KEPT_COLOURS = ("#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
DROPPED_COLOURS = ("#feedde", "#fdd0a2", "#fdae6b", "#fd8d3c", "#f16913", "#d94801", "#a63603", "#7f2704")
LINE_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")


def plan_figure(plan: Plan) -> str:
    """The picture, as the text of an SVG document."""
    try:
        summary = summary_of(plan)
    except PlanError:
        summary = None
    panels = [_heat_map(plan.layers)]
    if summary is not None:
        panels.append(_retained_by_layer(summary))
        if len(summary.retained_saliency.slices) > 1:
            panels.append(_overlaps(summary))
    body, top = [], 0
    for content, height in panels:
        body.append(f'<g transform="translate(0 {top})">{content}</g>')
        top += height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(body)}</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _heat_map(layers: Sequence[PlanLayer]) -> tuple[str, int]:
    num_experts = max(layer.num_experts for layer in layers)
    row = min(max(MAP_HEIGHT // len(layers), ROW_HEIGHT_LIMITS[0]), ROW_HEIGHT_LIMITS[1])
    # Runs of one colour are strokes of one path a colour: a rectangle a cell would make megabytes.
    strokes: dict[str, list[str]] = {}
    labels = []
    label_every = -(-14 // row)
    for position, layer in enumerate(layers):
        colours = _colours(layer)
        start = 0
        for expert in range(1, len(colours) + 1):
            if expert == len(colours) or colours[expert] != colours[start]:
                strokes.setdefault(colours[start], []).append(f"M{start} {position + 0.5}h{expert - start}")
                start = expert
        if position % label_every == 0:
            labels.append(_text(LEFT - 6, 34 + position * row + row / 2 + 4, str(layer.index), "end", 10))
    paths = "".join(f'<path d="{"".join(parts)}" stroke="{colour}"/>' for colour, parts in sorted(strokes.items()))
    height = len(layers) * row
    content = (
        _text(LEFT, 18, "Saliency of the experts of each layer, from the highest to the lowest", size=14)
        + f'<g transform="translate({LEFT} 34) scale({PLOT_WIDTH / num_experts:.6g} {row})">{paths}</g>'
        + "".join(labels)
        + _text(LEFT, 34 + height + 16, "1st", size=10)
        + _text(LEFT + PLOT_WIDTH, 34 + height + 16, f"{num_experts}th expert", "end", 10)
        + _legend([("kept", KEPT_COLOURS[5]), ("dropped", DROPPED_COLOURS[3])], 44)
    )
    return content, height + 70


def _colours(layer: PlanLayer) -> list[str]:
    kept = set(layer.kept)
    largest = max((value for value in layer.saliency if value is not None), default=0.0)
    colours = []
    for expert in _by_saliency(layer):
        value = layer.saliency[expert] if expert < len(layer.saliency) else None
        # The square root spreads the many small values over the ramp.
        level = 3 if value is None or largest <= 0 else int((max(value, 0.0) / largest) ** 0.5 * 7.999)
        colours.append((KEPT_COLOURS if expert in kept else DROPPED_COLOURS)[level])
    return colours


def _by_saliency(layer: PlanLayer) -> list[int]:
    """Experts from the highest saliency to the lowest, the kept ones first; by id without saliencies."""
    if not layer.saliency:
        return list(range(layer.num_experts))
    # One by hand may not have a value for each.
    given = (*layer.saliency, *[None] * layer.num_experts)
    values = [-float("inf") if value is None else value for value in given]
    return sorted(range(layer.num_experts), key=lambda expert: (-values[expert], expert))


def _legend(entries: Sequence[tuple[str, str]], top: int) -> str:
    x = LEFT + PLOT_WIDTH + 12
    return "".join(
        f'<rect x="{x}" y="{top + 18 * line - 9}" width="10" height="10" fill="{colour}"/>'
        + _text(x + 16, top + 18 * line, name[:18], size=11)
        for line, (name, colour) in enumerate(entries)
    )


def _retained_by_layer(summary: Summary) -> tuple[str, int]:
    layers = summary.retained_saliency.layers
    series = [("mixture", "#000000", [layer.mixture for layer in layers])]
    for number, name in enumerate(summary.retained_saliency.slices):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        series.append((name, colour, [layer.slices[name] for layer in layers]))
    lowest = min(value for _, _, values in series for value in values)
    floor = int(lowest * 10) / 10 if lowest < 1 else 0.9

    def place(position: int, value: float) -> str:
        x = LEFT + PLOT_WIDTH * (position / max(len(layers) - 1, 1))
        return f"{x:.1f},{34 + LINES_HEIGHT * (1 - (value - floor) / (1 - floor)):.1f}"

    lines = "".join(
        f'<polyline points="{" ".join(place(position, value) for position, value in enumerate(values))}" '
        f'fill="none" stroke="{colour}" stroke-width="{2 if name == "mixture" else 1.2}"/>'
        for name, colour, values in reversed(series)
    )
    grid = "".join(
        f'<path d="M{LEFT} {y}h{PLOT_WIDTH}" stroke="#dddddd"/>' + _text(LEFT - 6, y + 4, f"{value:.0%}", "end", 10)
        for value, y in ((1.0, 34), ((1 + floor) / 2, 34 + LINES_HEIGHT / 2), (floor, 34 + LINES_HEIGHT))
    )
    content = (
        _text(LEFT, 18, f"Retained saliency by layer ({summary.retained_saliency.criterion})", size=14)
        + grid
        + lines
        + _text(LEFT, 34 + LINES_HEIGHT + 16, f"layer {layers[0].index}", size=10)
        + _text(LEFT + PLOT_WIDTH, 34 + LINES_HEIGHT + 16, str(layers[-1].index), "end", 10)
        + _legend([(name, colour) for name, colour, _ in series], 44)
    )
    return content, max(LINES_HEIGHT, 18 * len(series)) + 70


def _overlaps(summary: Summary) -> tuple[str, int]:
    names = list(summary.retained_saliency.slices)
    cell = max(22, min(44, 500 // len(names)))
    left, top = LEFT + 100, 44
    parts = [_text(LEFT, 18, "Overlap (Jaccard) between the plans that each slice would make for itself", size=14)]
    for row, name in enumerate(names):
        parts.append(_text(left - 6, top + cell * row + cell / 2 + 4, name[:16], "end", 10))
        for column, value in enumerate(summary.slice_overlap[row]):
            level = min(int(value * 8), 7)
            x, y = left + cell * column, top + cell * row
            parts.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{KEPT_COLOURS[level]}"/>')
            ink = "white" if level > 3 else "black"
            parts.append(
                f'<text x="{x + cell / 2:g}" y="{y + cell / 2 + 4:g}" text-anchor="middle" font-size="9" '
                f'fill="{ink}">{value:.2f}</text>'
            )
    return "".join(parts), top + cell * len(names) + 20
