"""`live_server` serves the tests of more than one folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("serve")))
