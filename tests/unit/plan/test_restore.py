"""Experts that come back: those that the full router would use most, by numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from statistics_of import statistics

from reap_serve.errors import PlanError
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.model_limits import limits_of_statistics
from reap_serve.plan.planner import format_plan, make_plan
from reap_serve.plan.record import Plan, read_plan
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.plan.restore import MISSED_BY, restored
from reap_serve.statistics.file import write_statistics

# Yesterday experts 4 and 2 were salient; today the router sends most tokens to 3, then to 0 and 5 alike.
YESTERDAY = statistics({"a": ([[4, 10, 2, 6, 8, 10]], [[3.0, 1.0, 5.0, 3.0, 9.0, 0.0]])})
TODAY = statistics({"a": ([[8, 2, 2, 16, 4, 8]], [[1.0, 1.0, 5.0, 1.0, 9.0, 1.0]])})


def old_plan() -> Plan:
    request = PlanRequest(Size(keep_experts=2))
    evidence = gather(YESTERDAY, request, limits_of_statistics(YESTERDAY.header))
    return make_plan(YESTERDAY.header, evidence, decide(evidence, request.size))


def take_back(count: int) -> list[int]:
    request = PlanRequest(Size(keep_experts=2 + max(count, 1)), MISSED_BY)
    evidence = gather(TODAY, request, limits_of_statistics(TODAY.header))
    return restored(old_plan(), evidence, count).kept_LE[0].nonzero()[0].tolist()


def test_the_most_missed_come_back_and_ties_fall_to_the_smaller_index() -> None:
    assert old_plan().layers[0].kept == (2, 4)
    assert take_back(1) == [2, 3, 4]
    assert take_back(2) == [0, 2, 3, 4]
    assert take_back(4) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [0, 5])
def test_more_than_was_dropped_cannot_come_back(count: int) -> None:
    with pytest.raises(PlanError):
        take_back(count)


def test_the_command_writes_a_plan_that_predicts_what_is_still_dropped(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_bytes(format_plan(old_plan()))
    write_statistics(TODAY, str(tmp_path / "today.safetensors"), overwrite=False)
    words = ["plan", "restore", "old.json", "today.safetensors", "--experts", "1", "--output", "new.json", "--json"]
    command = [sys.executable, "-m", "reap_serve", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = read_plan(tmp_path / "new.json")
    assert made.layers[0].kept == (2, 3, 4)
    # Gates are alike: of 40 routed tokens 18 still go to 0, 1 and 5.
    assert json.loads(done.stdout)["summary"]["dropped_gate_mass"]["a"] == pytest.approx(18 / 40)
