"""The layers that tests of the adapter stand in for."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "adapter"))
