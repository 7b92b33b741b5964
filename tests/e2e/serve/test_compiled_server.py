"""The same plans on a compiled model, vLLM's default, where Dynamo traces through the router; ended by a SIGTERM."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from live_server import LiveServer
from served_material import MAX_TOKENS, Material
from streams import run_streams

from reap_serve.statistics.file import read_statistics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def server_options() -> list[str]:
    """None: vLLM compiles by default."""
    return []


def test_streams_get_the_plan_they_ask_for(server: LiveServer, material: Material) -> None:
    assert "--enforce-eager" not in server.log().splitlines()[0]

    async def disturb() -> None:
        for name in ("a", "b"):
            assert (await asyncio.to_thread(server.reap, "PUT", "mask", {"name": name})).status_code == 200
        assert (await asyncio.to_thread(server.reap, "DELETE", "mask")).status_code == 200
        await asyncio.sleep(0.2)

    outcome = asyncio.run(
        run_streams(server, material.prompts, material.answers, requests=300, max_tokens=MAX_TOKENS, disturb=disturb)
    )
    assert outcome.failed == []
    assert outcome.wrong == []
    assert outcome.answered.total() == 300


def test_a_terminated_server_has_written_everything(server: LiveServer, statistics_directory: Path) -> None:
    observed = server.status()["tokens_observed"]
    assert server.stop() == 0
    written = sum(
        int(read_statistics(str(path)).layer_token_count_SPL[:, :, 0].sum())
        for path in statistics_directory.glob("*.safetensors")
    )
    assert written == observed > 0
