"""What every command prints: one JSON document or a table on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

stdout = Console(soft_wrap=True, highlight=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(document: Mapping[str, object] | BaseModel) -> None:
    """Writes one JSON document to stdout."""
    value = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def note(message: str) -> None:
    """Writes a progress or log line to stderr."""
    stderr.print(message, markup=False)


def progress_bar() -> Progress:
    """A progress bar on stderr; it shows nothing unless stderr is a terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
        transient=True,
    )
