"""A stock vLLM OpenAI server as a child process: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from reap_serve.engine_environment import cpu_environment
from reap_serve.errors import EngineError

START_SECONDS = 900.0
STOP_SECONDS = 30.0
LOG_TAIL_BYTES = 65536
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers.

    Attributes:
        url: `http://127.0.0.1:<port>`.
        start_seconds: From the start of the process until it answered.
        pid: Of the process, which leads its own process group.
    """

    url: str
    start_seconds: float
    pid: int


@contextlib.contextmanager
def serve_model(model: Path, arguments: Sequence[str] = ()) -> Iterator[RunningServer]:
    """vLLM's OpenAI server on a checkpoint, with no plugin loaded, until the block ends.

    The server is started as a module, since the `vllm` command of the CPU wheel stops with PackageNotFoundError.

    Args:
        model: Model directory; also the served name.
        arguments: Further options of `vllm serve`.

    Raises:
        EngineError: It did not come up; carries its last error line.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    # An empty list of plugins: what is measured is stock vLLM.
    environment = {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", **cpu_environment(), **os.environ}
    with tempfile.TemporaryFile(prefix="reap-serve-vllm-") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            _wait_until_healthy(process, url, log)
            yield RunningServer(url, time.monotonic() - started, process.pid)
        finally:
            _stop(process)


def _end_with_parent() -> None:
    """Runs in the child: Linux ends it with SIGTERM when we are killed, so that no server outlives its comparison."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineError(
                f"vLLM stopped with exit code {process.returncode} while starting: {_last_error(log)}",
                "run `python -m vllm.entrypoints.openai.api_server --model ...` to see its whole log",
            )
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.25)
    raise EngineError(
        f"vLLM did not answer within {START_SECONDS:.0f} s: {_last_error(log)}", "is the model too large?"
    )


def _last_error(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - LOG_TAIL_BYTES))
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no output"])[-1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and the engine processes of its group."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
