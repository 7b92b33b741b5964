"""Every failure ends as one line and an exit code, whoever foresaw it."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from reap_serve.cli.boundary import run_command
from reap_serve.errors import InputFileError, StorageError


def failing(error: BaseException) -> Callable[[], object]:
    def command() -> object:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (InputFileError("a is corrupt", "leave it out"), 2, "a is corrupt; leave it out"),
        (StorageError("the disk is full", "free space"), 1, "the disk is full; free space"),
        (
            ValueError("bad\n\x1b[31mvalue"),
            1,
            "this is a defect: ValueError: bad \\x1b[31mvalue; run again with --debug and report it",
        ),
        (AssertionError(), 1, "this is a defect: AssertionError; run again with --debug and report it"),
        (
            RecursionError("too deep"),
            1,
            "this is a defect: RecursionError: too deep; run again with --debug and report it",
        ),
        (MemoryError(), 1, "the memory does not suffice; free some, or use a machine with more"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "aaa"),
            2,
            "aaa: File name too long; check the path, its permissions and the disk",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            1,
            "Input/output error; check the path, its permissions and the disk",
        ),
        (
            ModuleNotFoundError("No module named 'scipy.stats'", name="scipy"),
            1,
            "this needs the scipy package; pip install 'reap-serve[cpu]'",
        ),
        (KeyboardInterrupt(), 130, "interrupted; run the command again"),
    ],
)
def test_one_line_and_the_exit_code(
    error: BaseException, exit_code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(failing(error), debug=False) == exit_code
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_long_message_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(ValueError("x" * 10_000)), debug=False) == 1
    assert len(capsys.readouterr().err) < 700


def test_debug_adds_the_trace_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(ValueError("bad\x1b[31m")), debug=True) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-1].startswith("error: this is a defect: ValueError")
    assert printed.replace("\n", "").isprintable()


def test_what_a_command_returns() -> None:
    assert run_command(lambda: None, debug=False) == 0
    assert run_command(lambda: 1, debug=False) == 1
