"""Replay against an endpoint in a process of its own: requests as recorded, failures as failures, starts in time."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reap_serve.errors import EngineError
from reap_serve.traffic.benchmark_report import benchmark_report
from reap_serve.traffic.endpoint import ClientSettings
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.replay import replay
from reap_serve.traffic.schedule import Concurrency, Rate, Timed

pytest.importorskip("openai")

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "tests" / "unit" / "traffic" / "fixtures"


class MadeUpEndpoint:
    """A running `bench/traffic_endpoint.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self._output = process.stdout
        self.url = f"http://127.0.0.1:{json.loads(self._output.readline())['port']}"

    def bodies(self) -> list[dict[str, object]]:
        """Stops the endpoint and gives the bodies that it received."""
        self._process.terminate()
        found = json.loads(self._output.readline())["bodies"]
        assert isinstance(found, list)
        return found


@contextmanager
def made_up_endpoint(*options: str) -> Iterator[MadeUpEndpoint]:
    command = [sys.executable, str(ROOT / "bench" / "traffic_endpoint.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield MadeUpEndpoint(process)
        finally:
            process.kill()


def test_bodies_arrive_as_recorded() -> None:
    requests = list(read_traffic([str(FIXTURES / "openai_batch.jsonl")]))
    with made_up_endpoint() as endpoint:
        settings = ClientSettings(url=endpoint.url, tag_slices=True)
        result = asyncio.run(replay(requests, settings, Concurrency(1)))
        bodies = endpoint.bodies()
    for request, body in zip(requests, bodies, strict=True):
        assert request.body is not None
        added = {
            "model": "made-up",
            "stream": True,
            "stream_options": {"include_usage": True},
            "vllm_xargs": {"reap_slice": request.slice},
        }
        assert body == {**request.body, **added}
    summary = result.summary()
    assert (summary.requests, summary.failed, summary.output_tokens) == (4, 0, 16)
    assert summary.latency.ttft is not None
    assert summary.latency.ttft.p50 > 0


def test_lengths_are_replayed_as_filler() -> None:
    requests = list(read_traffic([str(FIXTURES / "mooncake.jsonl")], require_text=False))
    with made_up_endpoint() as endpoint:
        result = asyncio.run(replay(requests, ClientSettings(url=f"{endpoint.url}/v1/"), Timed(speedup=20.0)))
        first, second = endpoint.bodies()
    assert (first["max_tokens"], first["ignore_eos"], len(str(first["prompt"]).split(" "))) == (30, True, 1040)
    assert len(str(second["prompt"]).split(" ")) == 700
    assert [outcome.scheduled for outcome in result.outcomes] == pytest.approx([0.0, 3.052 / 20])


def test_token_times_and_failures() -> None:
    requests = list(read_traffic([str(FIXTURES / "openai_batch.jsonl")])) * 3
    with made_up_endpoint("--tokens", "5", "--gap-seconds", "0.02", "--fail-every", "4") as endpoint:
        result = asyncio.run(replay(requests, ClientSettings(url=endpoint.url), Concurrency(4)))
    summary = result.summary()
    # No retries: every fourth request fails, and is seen to.
    assert (summary.requests, summary.failed, summary.failures) == (12, 3, {"HTTP 500": 3})
    assert summary.latency.itl is not None
    assert summary.latency.e2e is not None
    assert 0.015 < summary.latency.itl.p50 < 0.2
    assert summary.latency.e2e.p50 > 5 * 0.02


def test_absent_endpoint_is_an_engine_error() -> None:
    requests = list(read_traffic([str(FIXTURES / "requests.jsonl")]))
    with pytest.raises(EngineError, match="does not answer"):
        asyncio.run(replay(requests, ClientSettings(url="http://127.0.0.1:9", timeout_seconds=5.0), Concurrency(1)))


def test_report_is_one_of_llm_d() -> None:
    schema = pytest.importorskip("llmd_benchmark_report")
    requests = list(read_traffic([str(FIXTURES / "openai_batch.jsonl")])) * 5
    with made_up_endpoint() as endpoint:
        settings = ClientSettings(url=endpoint.url, api_key="secret")
        for schedule in (Rate(200.0, burstiness=2.0), Concurrency(2)):
            result = asyncio.run(replay(requests, settings, schedule))
            document = benchmark_report(result, requests, settings, schedule)
            report = schema.load_benchmark_report(document)
            aggregate = report.results.request_performance.aggregate
            assert aggregate.requests.total == 20
            assert aggregate.latency.time_to_first_token.p50 == result.summary().latency.ttft.p50  # type: ignore[union-attr]
            assert "secret" not in json.dumps(document)
            assert "Paris" not in json.dumps(document)


def test_command_line(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with made_up_endpoint() as endpoint:
        command = [str(Path(sys.executable).with_name("reap-serve")), "replay", str(FIXTURES / "openai_batch.jsonl")]
        command += ["--url", endpoint.url, "--rate", "50", "--report", str(report), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    printed = json.loads(done.stdout)
    assert (printed["requests"], printed["failed"]) == (4, 0)
    assert set(printed["latency"]) == {"ttft", "itl", "tpot", "e2e"}
    assert set(printed["latency"]["ttft"]) == {"mean", "p50", "p90", "p99"}
    assert json.loads(report.read_text())["version"] == "0.2.1"
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_timed_starts_keep_their_schedule() -> None:
    # 4 s of what the bench measures for 60 s; the best of three, on a machine whose timers are in time.
    command = [sys.executable, str(ROOT / "bench" / "traffic_replay_timing.py"), "--seconds", "4", "--tokens", "4"]
    found: list[dict[str, float]] = []
    for _ in range(3):
        done = subprocess.run(
            [*command, "--real-time", "--json"], capture_output=True, text=True, check=False, timeout=120
        )
        found.append(json.loads(done.stdout))
        if done.returncode == 0:
            assert found[-1]["endpoint_p99"] <= 0.020
            return
    idle = min(measured["idle_timer_p99"] for measured in found)
    if idle > 0.005:
        pytest.skip(f"other work on this machine makes even an idle timer {1e3 * idle:.0f} ms late")
    assert min(measured["endpoint_p99"] for measured in found) <= 0.020
