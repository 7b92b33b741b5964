"""A server started by `reap-serve serve`, as a user would start it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from reap_serve.statistics.file import read_statistics

KEY = "sk-test"
START_SECONDS = 600


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def written_tokens(directory: Path) -> int:
    """Tokens in all files of statistics; each is read whole."""
    return sum(
        int(read_statistics(str(path)).layer_token_count_SPL[:, :, 0].sum()) for path in directory.glob("*.safetensors")
    )


class LiveServer:
    """The process and its address; `stop` ends it and all that it started.

    Args:
        model: What it serves.
        log: Where its output goes.
        options: Of `reap-serve serve`.
        settings: Further ones of observation; None starts plain vLLM, with no plugin.
        dtype: Of the model.
        variables: Added to its environment.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        options: Sequence[str],
        settings: dict[str, Any] | None,
        *,
        dtype: str = "float32",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        plugins: dict[str, str] = {}
        if settings is None:
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
            plugins["VLLM_PLUGINS"] = ""
        else:
            command = [sys.executable, "-m", "reap_serve", "serve", str(model), *options]
            command += ["--additional-config", json.dumps({"reap_serve": settings})]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--api-key", KEY]
        command += ["--served-model-name", "tiny", "--dtype", dtype]
        if "--max-model-len" not in options:
            command += ["--max-model-len", "512"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ, **plugins}
        environment |= variables or {}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # In a session of its own it gets half of the machine, and its idle workers, which spin, all of that.
                process_group=0,
            )

    def wait(self) -> None:
        """Waits until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self._log.read_text(errors="replace")[-4000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.25)
        raise AssertionError(self._log.read_text(errors="replace")[-4000:])

    def log(self) -> str:
        """What it printed so far."""
        return self._log.read_text(errors="replace")

    def reap(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """A call of one of our routes."""
        return httpx.request(
            method,
            f"{self.url}/v1/reap/{path}",
            json=body,
            headers={"Authorization": f"Bearer {KEY}", **headers},
            timeout=60,
        )

    def status(self) -> dict[str, Any]:
        """The status route's answer."""
        response = self.reap("GET", "status")
        assert response.status_code == 200, response.text
        found = response.json()
        assert isinstance(found, dict)
        return found

    def workers(self) -> list[psutil.Process]:
        """The processes that hold the model."""
        return self._called("worker")

    def api_servers(self) -> list[psutil.Process]:
        """The processes that answer, where there are several."""
        return self._called("apiserver")

    def _called(self, part: str) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if part in " ".join(child.cmdline()).lower()]

    def stop(self) -> int:
        """Asks it to end, and makes sure that nothing of it is left; gives its exit code."""
        tree = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        # The worker writes its last file while the server is already gone.
        for child in psutil.wait_procs(tree, timeout=60)[1]:
            child.kill()
        return code


def eventually(check: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for what a timer brings about."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def scrape(server: LiveServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of /metrics."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
