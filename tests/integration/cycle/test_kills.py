"""A cycle that is killed at random moments: nothing is lost, nothing that was finished is done again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "unit"
sys.path[:0] = [str(UNIT / name) for name in ("cycle", "prune", "compare")]

from cycle_world import World, made_up_world  # noqa: E402

from reap_serve.cycle.state import State  # noqa: E402
from reap_serve.prune.manifest import read_manifest  # noqa: E402
from reap_serve.prune.verify import verify  # noqa: E402

KILLS = 50
CHILD = Path(__file__).parent / "killed_cycle.py"


def run_once(root: Path, kill_after: float | None) -> bool:
    """A run that is killed so long after its imports, if it has not ended; whether it ended."""
    (root / "started").unlink(missing_ok=True)
    child = subprocess.Popen([sys.executable, str(CHILD), str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (root / "started").exists() and child.poll() is None:
        time.sleep(0.002)
    if kill_after is not None:
        time.sleep(kill_after)
    if kill_after is not None and child.poll() is None:
        child.kill()
        child.communicate()
        return False
    out, error = child.communicate()
    assert child.returncode == 0, error.decode()
    assert out.decode().strip() == "candidate"
    return True


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_lose_nothing_and_repeat_nothing_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made_up_world(tmp_path / "whole", monkeypatch)
    whole.observe("monday", favourites=(1, 3))
    began = time.monotonic()
    assert run_once(whole.root, None)
    longest = time.monotonic() - began
    rng = random.Random(0)
    kills = number = 0
    while kills < KILLS:
        number += 1
        world: World = made_up_world(tmp_path / f"world-{number}", monkeypatch)
        world.observe("monday", favourites=(1, 3))
        # Short lives first, then the last one is left alone.
        for _ in range(4):
            if run_once(world.root, rng.uniform(0, longest / 2)):
                break
            kills += 1
        assert run_once(world.root, None)
        (run,) = State(world.state).runs()
        assert read_manifest(run / "candidate").plan.layers[0].kept == (1, 3)
        assert verify(run / "candidate", str(world.root / "base"), run / "plan.json").sound
        assert not [path for path in run.iterdir() if path.name.startswith(".")], "something half-written is left"
        assert "REPEATED" not in (world.root / "engines.log").read_text()
