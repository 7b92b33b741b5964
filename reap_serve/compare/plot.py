"""One plot as a piece of HTML that needs plotly.js on its page, in the style of the report.

Base and candidate differ by colour and by hatching, slices by colour, dash and symbol: the plots read in grey too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from reap_serve.compare.bootstrap import Interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

BASE_COLOUR, CANDIDATE_COLOUR, NOISE_COLOUR = "#9a9a9a", "#0072b2", "#000000"
# Colours that people with any colour vision keep apart (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
_CONFIG = {"displaylogo": False, "responsive": True, "displayModeBar": False}


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot and what it shows.

    Attributes:
        html: The piece of HTML.
        caption: How its numbers are made.
    """

    html: str
    caption: str


def plotly_script() -> str:
    """The source of plotly.js."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def label(name: str) -> str:
    """A name as plotly has to be given it, since it reads some HTML in labels."""
    return escape(name)


def interval_bars(values: Sequence[float], ends: Sequence[Interval]) -> dict[str, object]:
    """Error bars of values from both ends of their intervals, as plotly takes them: distances."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, ends, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, ends, strict=True)],
    }


def piece(plot: go.Figure, name: str, height: int) -> str:
    """A plot as HTML.

    Args:
        plot: The figure; its layout is completed.
        name: Unique on the page.
        height: In pixels; the width is that of the place.
    """
    layout: dict[str, Any] = {
        "template": "plotly_white",
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 30, "b": 10},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1a1a1a"},
    }
    if plot.layout.title.text:
        # The title above the legend: side by side they do not fit a phone. Two entries fit a line, more have one each.
        layout["margin"]["t"] = 70 if len(plot.data) <= 2 else 60 + 18 * len(plot.data)
        layout["title"] = {"text": plot.layout.title.text, "font": {"size": 15}, "x": 0, "y": 0.97, "yanchor": "top"}
    plot.update_layout(**layout)
    plot.update_yaxes(automargin=True)
    plot.update_xaxes(automargin=True)
    return str(plot.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG, div_id=f"plot-{name}"))
