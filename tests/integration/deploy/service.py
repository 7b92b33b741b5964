"""A service of a deployment as a process, and what is asked of it over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 300.0
STOP_SECONDS = 60.0
# A small machine: little memory for the KV cache, one thread for each of several servers, no compilation.
SMALL = ("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16")
# The sources that the tests run from may stand on the path, before the wheel.
FROM_WHEEL = {"PYTHONPATH": ""}
SMALL_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """A process that answers over HTTP.

    Args:
        command: Its command line.
        url: Where it answers.
        log: Where its output goes.
        variables: Added to its environment.
    """

    def __init__(self, command: Sequence[str], url: str, log: Path, variables: Mapping[str, str]) -> None:
        self.url = url
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **SMALL_ENVIRONMENT, **variables},
                start_new_session=True,
            )

    def wait(self, path: str = "/health") -> None:
        """Waits until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._tail()
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + path, timeout=5):
                return
            time.sleep(0.25)
        raise AssertionError(f"no answer after {START_SECONDS} s: {self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """Asks it to end, and makes sure that nothing of it is left."""
        if self._process.poll() is None:
            tree = psutil.Process(self._process.pid).children(recursive=True)
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            # A worker writes its last file while the server is already gone.
            for child in psutil.wait_procs(tree, timeout=STOP_SECONDS)[1]:
                child.kill()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def call(url: str, body: object = None, *, key: str | None = None, method: str | None = None) -> Any:
    """The JSON answer of a request; POST where there is a body."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=content, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read() or b"null")


def eventually(check: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Waits for what a timer brings about."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
