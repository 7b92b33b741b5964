"""The small families stand with the tests of `prune`, the patched copies with the unit tests of the patches."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
sys.path[:0] = [
    str(TESTS / "integration" / "prune"),
    str(TESTS / "integration" / "record"),
    str(TESTS / "unit" / "patches"),
]
