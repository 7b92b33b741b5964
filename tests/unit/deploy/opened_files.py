"""A pytest plugin that notes which files below REAP_SERVE_WATCHED the run opens, one a line in REAP_SERVE_OPENED."""

from __future__ import annotations

import os
import sys
from pathlib import Path

WATCHED = Path(os.environ["REAP_SERVE_WATCHED"])
opened: set[str] = set()


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(f"{WATCHED}/"):
        opened.add(arguments[0])


sys.addaudithook(_note)


def pytest_unconfigure() -> None:
    """Writes what was seen."""
    Path(os.environ["REAP_SERVE_OPENED"]).write_text("".join(f"{name}\n" for name in sorted(opened)))
