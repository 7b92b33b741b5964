"""The program as scripts meet it: one line an error, the right exit code, answers without waiting."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from reap_serve import __version__


def reap_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reap_serve", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_version() -> None:
    done = reap_serve("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"reap-serve {__version__}\n", "")


def test_help_names_every_command_of_the_contract() -> None:
    done = reap_serve("--help")
    assert done.returncode == 0
    for command in ("demo", "observe", "stats", "plan", "prune", "verify", "compare", "replay"):
        assert command in done.stdout


def test_help_is_quick() -> None:
    """0.5 s is the promise; processor time, and the best of three, forgive a busy machine."""
    durations = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        reap_serve("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        durations.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(durations) < 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("--no-such-option",),
        ("plan",),
        ("plan", "missing.stats", "--keep-experts", "4", "--output", "never.json"),
        ("prune", "missing-model", "missing.json", "never"),
        ("verify", "missing-model"),
        ("observe", "missing-model", "missing.jsonl", "--output", "never"),
        ("compare", "missing-base", "missing-candidate", "missing.jsonl", "--output", "never"),
        ("stats", "show", "missing.stats"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(arguments: tuple[str, ...]) -> None:
    done = reap_serve(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "; " in done.stderr, "what is wrong; what to do"


def test_debug_adds_the_traceback() -> None:
    done = reap_serve("verify", "missing-model", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
