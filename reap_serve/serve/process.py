"""A stock vLLM OpenAI server as a child process: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from reap_serve.engine_environment import CPU_KV_CACHE_VARIABLE, PLUGINS_VARIABLE, SILENCE_VARIABLE, cpu_environment
from reap_serve.errors import EngineError

START_SECONDS = 900.0
STOP_SECONDS = 30.0
LOG_TAIL_BYTES = 65536
PR_SET_PDEATHSIG = 1
KV_CACHE_OPTION = "--kv-cache-memory-bytes"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers.

    Attributes:
        url: `http://127.0.0.1:<port>`.
        start_seconds: From the start of the process until it answered.
        pid: Of the process, which leads its own process group.
        weights_resident_bytes: What loading the weights took on a device, the largest that the log tells, to 0.01 GiB;
            None where it tells none, as on a CPU.
    """

    url: str
    start_seconds: float
    pid: int
    weights_resident_bytes: int | None


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
    from reap_serve.adapter.commands import API_SERVER_MODULE

    port = free_port()
    command = [sys.executable, "-m", API_SERVER_MODULE, "--model", str(model), *arguments]
    # An empty list of plugins: what is measured is stock vLLM.
    with run_server(command, {PLUGINS_VARIABLE: "", **engine_environment(arguments)}, port) as server:
        yield server


@contextlib.contextmanager
def run_server(command: Sequence[str], environment: Mapping[str, str], port: int) -> Iterator[RunningServer]:
    """A process that runs vLLM's OpenAI server, until the block ends.

    Args:
        command: Its command line, without host and port.
        environment: All of its variables.
        port: Where it shall listen, on this host alone.

    Raises:
        EngineError: It did not come up; carries its last error line.
    """
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile(prefix="reap-serve-vllm-") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            # In a session of its own it gets half of the machine, and its idle workers, which spin, all of that.
            process_group=0,
            preexec_fn=_end_with_parent,
        )
        try:
            _wait_until_healthy(process, command, url, log)
            yield RunningServer(url, time.monotonic() - started, process.pid, _weights_resident_bytes(log))
        finally:
            _stop(process)


def engine_environment(arguments: Sequence[str]) -> dict[str, str]:
    """The present variables with the defaults that a served model needs.

    Args:
        arguments: Options of `vllm serve`. On a CPU a variable would override their size of the KV cache.
    """
    environment = {SILENCE_VARIABLE: "1", **cpu_environment(), **os.environ}
    if any(argument.partition("=")[0] == KV_CACHE_OPTION for argument in arguments):
        environment.pop(CPU_KV_CACHE_VARIABLE, None)
    return environment


def _end_with_parent() -> None:
    """Runs in the child: Linux ends it with SIGTERM when we are killed, so that no server outlives its comparison."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], command: Sequence[str], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    # No proxy of the environment stands between this process and its child.
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise EngineError(
                    f"vLLM stopped with exit code {process.returncode} while starting: {_last_error(log)}",
                    # Without its options, which may hold a key.
                    f"run `{shlex.join(command[:5])}` with its options to see its whole log",
                )
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/health").is_success:
                    return
            time.sleep(0.25)
    raise EngineError(
        f"vLLM did not answer within {START_SECONDS:.0f} s: {_last_error(log)}", "is the model too large?"
    )


def _weights_resident_bytes(log: IO[bytes]) -> int | None:
    from reap_serve.adapter.commands import LOADED_LINE

    log.seek(0)
    sizes = [float(size) for size in LOADED_LINE.findall(log.read())]
    return round(max(sizes) * 2**30) if sizes else None


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
