"""Ctrl-C while an engine runs: one last line, exit code 130, no output, and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reap_serve.demo.run import demo_files

psutil = pytest.importorskip("psutil")
pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILES = demo_files()
MODEL, TRAFFIC, HELDOUT = str(FILES.model), str(FILES.calibration("code")), str(FILES.heldout("code"))
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
COMMANDS = {
    "observe": ("observe", MODEL, TRAFFIC, "--output"),
    "compare": ("compare", MODEL, MODEL, HELDOUT, "--server-args", "--enforce-eager --max-model-len 512", "--output"),
    "tune": ("tune", MODEL, TRAFFIC, "--keep-fraction", "0.5", "--output"),
}


def is_up(name: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether an engine starts: `compare` has it in a process of its own, which logs elsewhere."""
    if name != "compare":
        return b"KV cache" in log.read_bytes()
    return any("vllm" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children())


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c(name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "reap_serve", *COMMANDS[name], str(tmp_path / "out")],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=stream,
            # A shell lets what it starts in the background ignore Ctrl-C; this test may run there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        for _ in range(3000):
            if is_up(name, process, log):
                break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        time.sleep(1)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, output) == (130, b""), log.read_text()[-3000:]
    assert log.read_text().splitlines()[-1] == "error: interrupted; run the command again"
    assert not (tmp_path / "out").exists()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
