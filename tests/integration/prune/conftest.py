"""Tiny checkpoints are built once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from family_checkpoint import build
from tiny_families import FAMILIES


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the checkpoint of a family by its name in `FAMILIES`."""
    folder = tmp_path_factory.mktemp("families")

    def checkpoint(name: str) -> Path:
        directory = folder / name
        if not directory.exists():
            build(FAMILIES[name], directory)
        return directory

    return checkpoint
