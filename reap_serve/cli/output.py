"""What every command prints: one JSON document or tables and lines on stdout, everything else on stderr.

All of it is text. Names of slices, files, models and tensors come from strangers, so nothing is read as markup, and
characters that cannot be printed are shown as escapes: here, for every line, cell, title and heading.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, HighlighterType, JustifyMethod, OverflowMethod
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.style import Style
from rich.text import Text

from reap_serve.overwriting import is_stdout
from reap_serve.shown_text import shown

if TYPE_CHECKING:
    from pydantic import BaseModel


class _TextConsole(Console):
    """A console for which every string is a line of text."""

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: HighlighterType | None = None,
    ) -> Text:
        """What rich makes of a string, wherever it stands: the string itself, without markup and emoji codes."""
        return Text(shown(text), style=style, justify=justify, overflow=overflow)


stdout = _TextConsole(soft_wrap=True, highlight=False)
stderr = _TextConsole(stderr=True, soft_wrap=True, highlight=False)


def lines(*texts: str) -> Text:
    """A cell or a heading of several lines."""
    return Text("\n".join(map(shown, texts)))


def keep_stdout_for(output: Path | str) -> None:
    """Sends what the command prints to stderr where its output is stdout, so that nothing stands behind the data."""
    stdout.stderr = is_stdout(Path(output))


def print_json(document: Mapping[str, object] | BaseModel) -> None:
    """Writes one JSON document to stdout, in ASCII; to stderr where stdout is the output."""
    value = document if isinstance(document, Mapping) else document.model_dump(mode="json")
    (sys.stderr if stdout.stderr else sys.stdout).write(json.dumps(value, allow_nan=False) + "\n")


def note(message: str) -> None:
    """Writes a progress or log line to stderr."""
    stderr.print(message)


class _Description(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(shown(task.description))


def progress_bar(*, of_bytes: bool = False, apart: bool = False) -> Progress:
    """A progress bar on stderr with the time taken and the time left; it shows nothing unless stderr is a terminal.

    Args:
        of_bytes: Whether its numbers are bytes.
        apart: Whether it stays on stderr as it is now, while the process's own stderr leads elsewhere.
    """
    console = stderr
    if apart and stderr.is_terminal:
        console = _TextConsole(file=os.fdopen(os.dup(2), "w"), soft_wrap=True, highlight=False)
    return Progress(
        SpinnerColumn(),
        _Description(),
        BarColumn(),
        DownloadColumn() if of_bytes else MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not stderr.is_terminal,
        transient=True,
        redirect_stdout=not apart,
        redirect_stderr=not apart,
    )
