"""Host memory of a process and its children."""

from __future__ import annotations

import subprocess
import sys

from reap_serve.compare.resident import ResidentMemory

CHILD = "import sys, time; block = bytearray(b'x' * (64 << 20)); print('ready', flush=True); sys.stdin.read()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_children_count_and_the_peak_stays() -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    with ResidentMemory(process.pid) as resident:
        assert resident.first_bytes > 64 << 20
        process.stdin.close()
        process.wait(30)
        process.stdout.close()
        assert resident.look() >= resident.first_bytes
    assert resident.peak_bytes < 256 << 20


def test_a_process_that_is_gone_takes_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    with ResidentMemory(process.pid) as resident:
        assert resident.look() == 0
