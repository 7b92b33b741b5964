"""The small checkpoint stands with the tests of `prune`, the made-up report with those of `compare`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1]
sys.path[:0] = [str(UNIT / "prune"), str(UNIT / "compare"), str(Path(__file__).parent)]

from cycle_world import World, made_up_world  # noqa: E402


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """One operator's directories."""
    return made_up_world(tmp_path, monkeypatch)
