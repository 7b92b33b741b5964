"""Ends of a server: told to stop under load, its API server killed, its engine killed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from live_server import LiveServer
from streams import client_of

from reap_serve.demo.run import demo_files
from reap_serve.serve.ending import END_SECONDS
from reap_serve.statistics.file import read_statistics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STREAMS = 16


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    options = ["--enforce-eager", "--max-model-len", "2048", "--observe", str(tmp_path / "statistics")]
    options += ["--flush-seconds", "3600", "--overhead-budget", "none"]
    started = LiveServer(demo_files().model, tmp_path / "log", options, {"minimum_tokens": 1})
    try:
        started.wait()
        yield started
    finally:
        started.stop()


async def under_load(server: LiveServer, act: Any) -> float:
    """Acts while answers stream that would go on for long; seconds until the server's process has ended."""
    streaming: set[int] = set()
    async with client_of(server) as client:

        async def ask(number: int) -> None:
            chat: Any = {"model": "tiny", "messages": [{"role": "user", "content": f"Count to {number}."}]}
            endless: Any = {"max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}
            try:
                async for _ in await client.chat.completions.create(**chat, **endless):
                    streaming.add(number)
            except Exception:  # noqa: BLE001 - the server is ended under it
                return

        asked = [asyncio.create_task(ask(number)) for number in range(STREAMS)]
        while len(streaming) < STREAMS:
            await asyncio.sleep(0.05)
        started = time.monotonic()
        act()
        await asyncio.to_thread(server.process.wait, 180)
        seconds = time.monotonic() - started
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    return seconds


def test_told_to_stop_under_load_it_ends_in_time_and_writes_its_last_file(server: LiveServer, tmp_path: Path) -> None:
    tree = psutil.Process(server.process.pid).children(recursive=True)
    seconds = asyncio.run(under_load(server, lambda: server.process.send_signal(signal.SIGTERM)))
    assert seconds < END_SECONDS + 5
    assert psutil.wait_procs(tree, timeout=30)[1] == []
    files = list((tmp_path / "statistics").glob("*.safetensors"))
    assert files
    assert sum(int(read_statistics(str(path)).layer_token_count_SPL[:, :, 0].sum()) for path in files) > STREAMS
    assert not list((tmp_path / "statistics").glob(".*"))


def test_no_engine_outlives_a_killed_api_server(server: LiveServer) -> None:
    tree = psutil.Process(server.process.pid).children(recursive=True)
    assert tree
    asyncio.run(under_load(server, server.process.kill))
    assert psutil.wait_procs(tree, timeout=40)[1] == []


def test_a_killed_engine_is_no_success(server: LiveServer) -> None:
    def kill() -> None:
        for child in server.workers():
            child.kill()

    asyncio.run(under_load(server, kill))
    assert server.process.returncode != 0
