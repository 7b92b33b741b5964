"""Two data-parallel engines behind one server: control reaches both, and what both count is written once."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest
from live_server import LiveServer, written_tokens
from served_material import MAX_TOKENS, Material
from streams import run_streams, run_under_control

from reap_serve.statistics.file import read_statistics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REQUESTS = 1000
PATCH = "0006-cpu-data-parallel-moe.patch"


@pytest.fixture(scope="module")
def server_options() -> list[str]:
    """Two engines behind one API server, eager."""
    return ["--enforce-eager", "--data-parallel-size", "2", "--api-server-count", "1"]


@pytest.fixture(scope="module")
def server_variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A vLLM whose CPU ranks can exchange rows."""
    sys.path.append(str(Path(__file__).parents[2] / "unit" / "patches"))
    from patched_vllm import RELEASE, patched_package

    site = patched_package([RELEASE / PATCH], tmp_path_factory.mktemp("site"))
    cores = sorted(os.sched_getaffinity(0))
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    # By itself vLLM gives each rank a NUMA node of its own.
    return {"PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}", "OMP_NUM_THREADS": "1"}


def test_a_thousand_streams_under_changing_control(server: LiveServer, material: Material) -> None:
    assert server.status()["engines"] == 2
    outcome = asyncio.run(
        run_under_control(server, material.prompts, material.answers, requests=REQUESTS, max_tokens=MAX_TOKENS)
    )
    assert outcome.failed == []
    assert outcome.wrong == []
    assert outcome.answered.total() == REQUESTS


def test_an_idle_server_writes_all_that_both_engines_recorded(server: LiveServer, statistics_directory: Path) -> None:
    time.sleep(1.0)
    assert server.reap("POST", "flush").status_code == 200
    status = server.status()
    assert status["complete"] is True
    assert status["failures"] == 0
    assert written_tokens(statistics_directory) == status["writer"]["tokens_written"] == status["tokens_observed"] > 0
    assert sum(server.reap("GET", "stats").json()["slices"].values()) == status["tokens_observed"]


def test_a_killed_rank_costs_its_interval_and_the_other_says_so(
    server: LiveServer, statistics_directory: Path, material: Material
) -> None:
    before = {path.name for path in statistics_directory.glob("*.safetensors")}
    engines = [child for child in server.workers() or [] if child.is_running()]
    assert len(engines) == 2

    async def kill() -> None:
        await asyncio.sleep(3.0)
        if engines[0].is_running():
            engines[0].kill()
        await asyncio.sleep(60.0)

    outcome = asyncio.run(
        run_streams(server, material.prompts, material.answers, requests=60, max_tokens=200, disturb=kill)
    )
    assert outcome.failed, "requests under way on a dead engine fail, as they do without observation"
    server.process.wait(120)
    files = {path.name: read_statistics(str(path)) for path in statistics_directory.glob("*.safetensors")}
    assert before <= files.keys()
    later = [statistics for name, statistics in files.items() if name not in before]
    # What the other rank wrote at its end is marked.
    assert any(not statistics.header.complete for statistics in later)
