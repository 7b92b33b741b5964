"""`kill -9` of the worker under load: requests fail exactly as plain vLLM's do, and the files are whole."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer
from streams import STREAMS, client_of

from reap_serve.demo.run import demo_files
from reap_serve.statistics.file import read_statistics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Death:
    """What clients and the shell see of a server whose worker was killed.

    Attributes:
        failures: Errors of the requests under way, by kind.
        later: The error of a request after them.
        exit_code: Of the server.
    """

    failures: dict[str, int]
    later: str
    exit_code: int


async def fail_under_load(server: LiveServer, ready: Callable[[], bool]) -> tuple[Counter[str], str]:
    """Kills the workers while answers stream, once it is time; the errors that clients see then and later."""
    workers = server.workers()
    assert workers
    streaming: set[int] = set()
    async with client_of(server) as client:

        async def ask(number: int) -> str:
            chat: Any = {"model": "tiny", "messages": [{"role": "user", "content": f"Count to {number}."}]}
            endless: Any = {"max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}
            try:
                async for _ in await client.chat.completions.create(**chat, **endless):
                    streaming.add(number)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
                return f"{type(error).__name__} {getattr(error, 'status_code', '')}"
            return "answered"

        asked = [asyncio.create_task(ask(number)) for number in range(STREAMS)]
        while len(streaming) < STREAMS or not ready():
            assert not any(task.done() for task in asked)
            await asyncio.sleep(0.01)
        for worker in workers:
            worker.kill()
        failures = Counter(await asyncio.gather(*asked))
        await asyncio.to_thread(server.process.wait, 120)
        return failures, await ask(0)


def death(server: LiveServer, ready: Callable[[], bool] = lambda: True) -> Death:
    """Starts a server, lets its worker die once it is time, and notes how it ends."""
    try:
        server.wait()
        failures, later = asyncio.run(fail_under_load(server, ready))
        return Death(dict(failures), later, server.process.wait(120))
    finally:
        server.stop()


def test_serving_fails_as_plain_vllm_does(tmp_path: Path) -> None:
    model, directory = demo_files().model, tmp_path / "statistics"
    # Answers so long that none is over when the last of the streams has begun.
    options = ["--enforce-eager", "--max-model-len", "2048"]
    plain = death(LiveServer(model, tmp_path / "plain.log", options, None))
    observing = [*options, "--observe", str(directory), "--flush-seconds", "0.2"]
    # On a busy machine the streams have begun long before the first file is written.
    observed = death(
        LiveServer(model, tmp_path / "observed.log", observing, {"minimum_tokens": 1}),
        lambda: any(directory.glob("*.safetensors")),
    )
    assert (observed.failures, observed.later) == (plain.failures, plain.later)
    # Plain vLLM calls this end a success.
    assert observed.exit_code == 1
    assert plain.failures.keys() != {"answered"}
    files = list(directory.glob("*.safetensors"))
    assert files
    for path in files:
        statistics = read_statistics(str(path))
        assert statistics.header.complete
        assert statistics.layer_token_count_SPL.sum() > 0
