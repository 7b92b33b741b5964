"""One run of a cycle whose engines are played, for a parent that kills it: `killed_cycle.py ROOT`.

Each played engine notes in ROOT/engines.log that it was asked, and whether what it is asked for was there already.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

UNIT = Path(__file__).parents[2] / "unit"
sys.path[:0] = [str(UNIT.parent), *(str(UNIT / name) for name in ("cycle", "prune", "compare"))]

from cycle_world import report_of  # noqa: E402

from reap_serve.compare.run import Comparison  # noqa: E402
from reap_serve.cycle import steps  # noqa: E402
from reap_serve.cycle.run import run_cycle  # noqa: E402

SECONDS = 0.1


def played(root: Path, name: str, published: str) -> Callable[..., Comparison]:
    """An engine's work: it takes a while, and its result must not be there yet."""

    def work(base: str, candidate: object, *_: object) -> Comparison:
        repeated = any((run / published).exists() for run in (root / "state" / "runs").iterdir())
        with open(root / "engines.log", "a") as log:
            log.write(f"{'REPEATED ' if repeated else ''}{name}\n")
        time.sleep(SECONDS)
        plans = dict.fromkeys(candidate, 0.01) if isinstance(candidate, dict) else {}
        return Comparison(report_of(base, "candidate", 0.01, plans), {})

    return work


if __name__ == "__main__":
    root = Path(sys.argv[1])
    steps.sweep = played(root, "sweep", f"{steps.TRIAL_NAME}/{steps.REPORT_NAME}")
    steps.compare = played(root, "compare", f"{steps.COMPARISON_NAME}/{steps.REPORT_NAME}")
    with open(root / "started", "w") as ready:
        ready.write("imports are over\n")
    print(run_cycle(root / "cycle.toml").decision)
