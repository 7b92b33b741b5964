"""How a server ends: in time, and with a code that tells of a dead engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from reap_serve.adapter.parent import VARIABLE
from reap_serve.serve.ending import SIBLING_SECONDS, Ending


class Leave:
    """Instead of the end of the process."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.called = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.called.set()


class FakeEngine:
    """Alive or dead."""

    def __init__(self, errored: bool) -> None:
        self.errored = errored

    def before_shutdown(self, wrap: Any) -> None:
        """Called by `install` alone."""


def ending(errored: bool) -> tuple[Ending, Leave, list[dict[str, Any]]]:
    leave, calls = Leave(), list[dict[str, Any]]()
    return Ending(FakeEngine(errored), leave), leave, calls


def test_what_follows_the_signal_has_a_bound() -> None:
    made, leave, calls = ending(errored=False)
    made.bounded(lambda **keywords: calls.append(keywords), seconds=0.05)(timeout=0.05)
    assert calls == [{"timeout": 0.05}]
    assert leave.called.wait(10)
    assert leave.codes == [128 + signal.SIGTERM]


@pytest.mark.parametrize(
    ("errored", "asked", "codes"), [(False, False, []), (False, True, []), (True, False, [1]), (True, True, [1])]
)
def test_a_dead_engine_is_no_success(errored: bool, asked: bool, codes: list[int]) -> None:
    """Also where vLLM calls `shutdown` because it is dead."""
    made, leave, _ = ending(errored)
    if asked:
        made.bounded(lambda **keywords: None)()
    made.at_exit()
    assert leave.codes == codes


def test_an_engine_that_dies_after_it_was_told_to_stop_is_no_failure() -> None:
    engine, leave = FakeEngine(errored=False), Leave()
    made = Ending(engine, leave)
    made.bounded(lambda **keywords: setattr(engine, "errored", True))()
    made.at_exit()
    assert leave.codes == []


def test_the_siblings_of_a_dead_engine_have_time_to_write() -> None:
    """vLLM asks them to end, and kills those that are still there after the timeout."""
    made, _, calls = ending(errored=True)
    for timeout in (0, 30, None):
        made.bounded(lambda **keywords: calls.append(keywords))(timeout=timeout)
    assert calls == [{"timeout": SIBLING_SECONDS}, {"timeout": 30}, {"timeout": SIBLING_SECONDS}]


PARENT = """
import multiprocessing, sys, time
from reap_serve.adapter.parent import end_with_parent

def child(path):
    end_with_parent()
    end_with_parent()
    open(path, "w").write(str(multiprocessing.current_process().pid))
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[1]).Process(target=child, args=(sys.argv[2],)).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_ends_with_its_parent(tmp_path: Any, method: str) -> None:
    script, noted = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script, method, noted], env={**os.environ, VARIABLE: "1"})
    deadline = time.monotonic() + 60
    while not (noted.exists() and noted.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(noted.read_text())
    parent.kill()
    parent.wait()
    while time.monotonic() < deadline:
        try:
            # A killed parent reaps nobody: an ended child may stay a zombie of the first process.
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")
