"""Two API servers before one engine: plans, control and metrics are the engine's, whichever of them is asked."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from live_server import KEY, LiveServer
from prometheus_client.parser import text_string_to_metric_families
from served_material import MAX_TOKENS, SETTINGS, Material
from streams import run_streams

from reap_serve.statistics.file import read_statistics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# So often that each server answers some, whichever the kernel gives a new connection to.
ASKED = 24


@pytest.fixture(scope="module")
def server_options() -> list[str]:
    """Two API servers, eager."""
    return ["--enforce-eager", "--api-server-count", "2"]


def scrape(server: LiveServer) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample of ours of /metrics, over a connection of its own."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("reap_serve_")
    }


def complete(server: LiveServer, prompt: str) -> str:
    """One greedy answer under the default plan, over a connection of its own."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": prompt}]}
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={**chat, "max_tokens": MAX_TOKENS, "temperature": 0.0},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    return str(response.json()["choices"][0]["message"]["content"])


def test_every_server_knows_of_a_change(server: LiveServer, material: Material) -> None:
    assert len(server.api_servers()) == 2
    assert server.reap("PUT", "mask", {"name": "a"}).status_code == 200
    # The other server reads the engine within `metrics_seconds`.
    time.sleep(2 * SETTINGS["metrics_seconds"])
    assert {server.status()["mask"]["default"] for _ in range(ASKED)} == {"a"}

    assert {complete(server, material.prompts[0]) for _ in range(ASKED)} == {material.answers["a"][0]}

    async def nothing() -> None:
        await asyncio.sleep(1.0)

    outcome = asyncio.run(
        run_streams(server, material.prompts, material.answers, requests=200, max_tokens=MAX_TOKENS, disturb=nothing)
    )
    assert outcome.failed == []
    assert outcome.wrong == []
    assert server.reap("DELETE", "mask").status_code == 200


def test_metrics_are_the_engines_on_every_server(server: LiveServer, statistics_directory: Path) -> None:
    assert server.reap("POST", "flush").status_code == 200
    time.sleep(4 * SETTINGS["metrics_seconds"])
    status = server.status()
    for found in (scrape(server) for _ in range(ASKED)):
        assert found["reap_serve_tokens_observed_total", ()] == status["tokens_observed"] > 0
        assert found["reap_serve_tokens_masked_total", ()] == status["tokens_masked"] > 0
        assert found["reap_serve_files_written_total", ()] == status["writer"]["files_written"] > 0
        assert found["reap_serve_recording", ()] == 1
        assert found["reap_serve_plan_active", ("a",)] == found["reap_serve_plan_active", ("b",)] == 0
        # float32: 10.55 million parameters, once.
        assert found["reap_serve_weights_bytes", ()] == pytest.approx(4 * 10.55e6, rel=0.1)
        assert len([name for name, _ in found if name == "reap_serve_build_info"]) == 1


def test_a_terminated_server_has_written_everything_once(server: LiveServer, statistics_directory: Path) -> None:
    observed = server.status()["tokens_observed"]
    server.stop()
    written = sum(
        int(read_statistics(str(path)).layer_token_count_SPL[:, :, 0].sum())
        for path in statistics_directory.glob("*.safetensors")
    )
    assert written == observed > 0
