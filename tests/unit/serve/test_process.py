"""The served child process, with a stub in the place of vLLM's server module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from reap_serve.errors import EngineError
from reap_serve.serve.process import serve_model

STUB = """
import http.server, sys
for size in ("13.25", "13.5"):
    print(f"INFO [gpu_model_runner.py:5150] Model loading took {size} GiB memory and 4.2 seconds", flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
if "--refuse" in sys.argv:
    print("ValueError: no such quantisation")
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def stub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `vllm` that shadows the real one in child processes."""
    module = tmp_path / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    for folder in (module, module.parent, module.parent.parent):
        (folder / "__init__.py").write_text("")
    (module / "api_server.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie is dead but for its parent's notice.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_server_answers_inside_the_block_and_is_gone_after_it(tmp_path: Path) -> None:
    with serve_model(tmp_path) as server:
        assert urllib.request.urlopen(f"{server.url}/health", timeout=5).status == 200
        assert alive(server.pid)
        assert server.weights_resident_bytes == 13.5 * 2**30
    assert not alive(server.pid)


def test_a_server_that_does_not_start_is_one_error_with_its_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match="exit code 3 while starting: ValueError: no such quantisation; run"),
        serve_model(tmp_path, ["--refuse"]),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_parent_takes_its_server_along(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from reap_serve.serve.process import serve_model\n"
        "with serve_model(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)
