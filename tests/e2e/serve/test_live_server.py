"""One server in float32 on the CPU: observation, plans and metrics while requests stream, and the end by kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from answered_queries import QUERIES, dashboard_queries
from failing_disk import serve_while_the_disk_fails
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from live_server import KEY, LiveServer, eventually, free_port, scrape, written_tokens
from served_material import MAX_TOKENS, Material
from streams import run_streams, run_under_control

from reap_serve.statistics.file import read_statistics

REQUESTS = 1000

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def server_options() -> list[str]:
    """Eager: compiling takes longer than all tests."""
    return ["--enforce-eager"]


def complete(server: LiveServer, material: Material, plan: str | None, number: int = 0) -> str:
    """One greedy chat answer."""
    arguments = {} if plan is None else {"vllm_xargs": {"reap_plan": plan}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": material.prompts[number]}],
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            extra_body=arguments,
        )
    return answer.choices[0].message.content or ""


def test_the_command_is_printed_without_the_key(server: LiveServer) -> None:
    (line,) = [line for line in server.log().splitlines() if "VLLM_PLUGINS=" in line]
    assert "reap_serve.adapter.worker.ReapWorkerExtension" in line
    assert KEY not in line


def test_nothing_of_ours_answers_without_the_key(server: LiveServer) -> None:
    for method, path in (("GET", "status"), ("GET", "stats"), ("POST", "stop"), ("PUT", "mask"), ("DELETE", "mask")):
        assert httpx.request(method, f"{server.url}/v1/reap/{path}").status_code == 401
        assert server.reap(method, path, Authorization="Bearer wrong").status_code == 401
    assert server.status()["recording"] is True


def test_wrong_requests_are_refused_in_openais_shape(server: LiveServer, material: Material) -> None:
    for body in ({"name": "x", "directory": "/etc"}, {"name": "../x"}, {"name": "x", "plan": {"layers": 3}}, [], None):
        response = server.reap("PUT", "mask", body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == 400
    chat: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for arguments in ({"reap_plan": "unknown"}, {"reap_plan_id": "x"}, {"reap_slice": "a\nb"}):
        for stream in (False, True):
            response = httpx.post(
                f"{server.url}/v1/chat/completions",
                json={**chat, "stream": stream, "vllm_xargs": arguments},
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=60,
            )
            assert response.status_code == 400, (arguments, stream, response.text)
            assert "vllm_xargs" in response.json()["error"]["message"]
    assert complete(server, material, None) == material.answers["base"][0]


def test_a_default_plan_is_switched_on_and_off(server: LiveServer, material: Material) -> None:
    assert server.reap("PUT", "mask", {"name": "a"}).json()["default"] == "a"
    assert complete(server, material, None) == material.answers["a"][0]
    assert complete(server, material, "base") == material.answers["base"][0]
    eventually(lambda: scrape(server).get(("reap_serve_plan_active", (("plan", "a"),))) == 1.0)
    assert server.reap("DELETE", "mask").json()["default"] is None
    # The prefix of this prompt is cached under three plans by now.
    assert complete(server, material, None) == material.answers["base"][0]


def test_requests_under_a_plan_are_not_recorded(server: LiveServer, material: Material) -> None:
    before = server.status()
    complete(server, material, "a", 3)
    after = server.status()
    assert after["tokens_observed"] == before["tokens_observed"]
    assert after["tokens_masked"] > before["tokens_masked"]
    complete(server, material, "base", 3)
    assert server.status()["tokens_observed"] > after["tokens_observed"]


def test_a_thousand_streams_under_changing_control(server: LiveServer, material: Material) -> None:
    """32 at a time: base, two plans and the default side by side, while recording and the default are switched."""
    outcome = asyncio.run(
        run_under_control(server, material.prompts, material.answers, requests=REQUESTS, max_tokens=MAX_TOKENS)
    )
    assert outcome.failed == []
    assert outcome.wrong == []
    assert outcome.answered.total() == REQUESTS
    assert set(outcome.answered) == {"base", "a", "b", "default"}


def test_files_are_whole_and_hold_what_was_recorded(server: LiveServer, statistics_directory: Path) -> None:
    server.reap("POST", "flush")
    status = server.status()
    tokens = written_tokens(statistics_directory)
    assert tokens == status["writer"]["tokens_written"]
    assert tokens + status["writer"]["tokens_pending"] == status["tokens_observed"]
    assert status["complete"] is True
    assert status["failures"] == 0


def test_the_metrics_tell_of_it(server: LiveServer) -> None:
    status = server.status()
    eventually(lambda: scrape(server)["reap_serve_tokens_observed_total", ()] == status["tokens_observed"])
    found = scrape(server)
    assert found["reap_serve_tokens_masked_total", ()] == status["tokens_masked"]
    assert found["reap_serve_recording", ()] == 1
    assert found["reap_serve_files_written_total", ()] == status["writer"]["files_written"]
    # float32: 10.55 million parameters.
    assert found["reap_serve_weights_bytes", ()] == pytest.approx(4 * 10.55e6, rel=0.1)
    assert found["reap_serve_kv_cache_capacity_tokens", ()] > 0
    for plan in ("a", "b"):
        assert 0.02 < found["reap_serve_dropped_gate_mass_fraction", (("plan", plan), ("slice", "default"))] < 0.98
    assert any(name == "vllm:request_success_total" for name, _ in found)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_a_prometheus_server_scrapes_it(server: LiveServer, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: vllm, static_configs: [{{targets: ['127.0.0.1:{server.port}']}}]}}]\n"
    )
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answered(query: str) -> bool:
        try:
            response = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=5)
        except httpx.HTTPError:
            return False
        return response.status_code == 200 and bool(response.json()["data"]["result"])

    try:
        queries = [*QUERIES, *dashboard_queries()]
        eventually(lambda: all(map(answered, queries)))
        unanswered = [query for query in queries if not answered(query)]
    finally:
        process.terminate()
        process.wait(30)
    assert unanswered == []
    assert len(queries) > 15


def test_no_request_made_from_the_document_breaks_it(server: LiveServer, material: Material) -> None:
    """Requests that the routes' own OpenAPI document allows, and broken ones; they may take plans away."""
    schemathesis = pytest.importorskip("schemathesis")
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json").include(path_regex="^/v1/reap/")
    codes: Counter[int] = Counter()
    for operation in document.get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def call(case: Any) -> None:
                response = case.call(headers={"Authorization": f"Bearer {KEY}"})
                codes[response.status_code] += 1
                assert response.status_code < 500, response.text
                assert response.status_code < 400 or response.json().keys() & {"error", "detail"}

            with contextlib.suppress(Unsatisfiable):
                call()
    assert codes.total() > 50
    assert codes[200] > 0
    assert max(codes) >= 400
    for name, path in material.plans.items():
        body = {"name": name, "plan": json.loads(path.read_text())}
        assert server.reap("PUT", "mask", body).json()["default"] == name
    assert server.reap("DELETE", "mask").status_code == 200
    assert server.reap("POST", "start").json()["recording"] is True


def test_an_unwritable_directory_under_load(server: LiveServer, material: Material, statistics_directory: Path) -> None:
    """A file takes the place of the directory's parent; whoever runs this, nothing can be written below it."""
    parent, away = statistics_directory.parent, statistics_directory.parent.with_name("away")

    def break_it() -> None:
        parent.rename(away)
        parent.touch()

    def mend_it() -> None:
        parent.unlink()
        away.rename(parent)

    before = server.reap("POST", "flush").json()["writer"]["tokens_written"]
    written = written_tokens(statistics_directory)
    serve_while_the_disk_fails(server, material, break_it, mend_it)
    gained = server.status()["writer"]["tokens_written"] - before
    assert written_tokens(statistics_directory) - written == gained > 0
    assert not list(statistics_directory.glob(".*"))


def test_a_full_disk_under_load(server: LiveServer, material: Material, statistics_directory: Path) -> None:
    """The directory is a file system of one megabyte, with nothing of it left."""
    before = server.reap("POST", "flush").json()["writer"]["tokens_written"]
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(statistics_directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root alone")
    filler = statistics_directory / "filler"

    def break_it() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert os.statvfs(filler).f_bavail == 0

    try:
        serve_while_the_disk_fails(server, material, break_it, filler.unlink)
        gained = server.status()["writer"]["tokens_written"] - before
        assert written_tokens(statistics_directory) == gained > 0
        assert not list(statistics_directory.glob(".*"))
    finally:
        subprocess.run(["umount", str(statistics_directory)], check=True)


def test_killing_the_worker_leaves_whole_files(
    server: LiveServer, material: Material, statistics_directory: Path
) -> None:
    """The last test: the engine dies under load, as plain vLLM's would, and what was written stays readable."""
    workers = server.workers()
    assert workers

    async def kill_under_load() -> None:
        async def disturb() -> None:
            await asyncio.sleep(1.0)
            for worker in workers:
                if worker.is_running():
                    worker.kill()

        await run_streams(
            server, material.prompts, material.answers, requests=200, max_tokens=MAX_TOKENS, disturb=disturb
        )

    asyncio.run(kill_under_load())
    files = sorted(statistics_directory.glob("*.safetensors"))
    assert files
    for path in files:
        assert read_statistics(str(path)).header.complete
    eventually(lambda: server.process.poll() is not None, 120)
