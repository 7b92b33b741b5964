"""What a section of the page consists of, whatever it shows."""

from __future__ import annotations

from dataclasses import dataclass

from reap_serve.compare.plot import Plot

# Signs beside the colours: a print in grey says the same.
SIGNS = {"within": "✓", "unclear": "?", "beyond": "▲"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a table.

    Attributes:
        label: Heading of its column.
        text: The figure.
        detail: Its interval, or what it is compared with.
        level: How it is judged; None where there is no limit.
        noise: The same of the base measured twice; empty where that was not done.
        mark: What limits the detail; empty where nothing does.
    """

    label: str
    text: str
    detail: str = ""
    level: str | None = None
    noise: str = ""
    mark: str = ""

    @property
    def sign(self) -> str:
        """The level without colour."""
        return SIGNS.get(self.level or "", "")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        name: Its heading.
        level: How it is judged; None where there is no limit.
        cells: Its figures, those of all lines in the same order.
        group: Heading of the first column.
    """

    name: str
    level: str | None
    cells: tuple[Cell, ...]
    group: str = "Slice"

    @property
    def sign(self) -> str:
        """The level without colour."""
        return SIGNS.get(self.level or "", "")


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page: a heading, a table, notes, plots, each of the latter three where there are any.

    Attributes:
        title: Its heading.
        rows: Of its table.
        notes: Paragraphs below the table: how the figures are made.
        plots: Below the notes.
    """

    title: str
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()
