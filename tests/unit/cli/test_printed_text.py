"""What is not ours is printed as text: no markup, no control character."""

from __future__ import annotations

import io
import logging

import pytest
from rich.table import Table

from reap_serve.cli.output import lines, note, print_json, progress_bar, stderr, stdout
from reap_serve.errors import InputFileError
from reap_serve.shown_text import shown, shown_logger

HOSTILE = "[/x] a[red]b :smile: \x1b[31m\x07\u202e\ud800\r\nerror: forged"
SHOWN = "[/x] a[red]b :smile: \\x1b[31m\\x07\\u202e\\ud800\\r\\nerror: forged"


def test_characters_that_cannot_be_printed_are_escapes() -> None:
    assert shown(HOSTILE) == SHOWN
    assert shown("plain, schön, 文字 [x]") == "plain, schön, 文字 [x]"
    assert shown("") == ""


def test_lines_on_both_streams(capsys: pytest.CaptureFixture[str]) -> None:
    stdout.print(HOSTILE)
    note(HOSTILE)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{SHOWN}\n", f"{SHOWN}\n")


def test_titles_headings_and_cells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    table = Table(HOSTILE, title=f"title {HOSTILE}", caption=f"caption {HOSTILE}")
    table.add_column(f"column {HOSTILE}")
    table.add_row(HOSTILE, lines(HOSTILE, "second"))
    stdout.print(table)
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 6
    assert printed.replace("\n", "").isprintable()
    assert [line for line in printed.splitlines() if "second" in line]


def test_the_progress_bar() -> None:
    stream = io.StringIO()
    with progress_bar() as progress:
        task = progress.add_task(HOSTILE, total=1)
        column = progress.columns[1]
        assert str(column(progress.tasks[task])) == SHOWN
    assert stream.getvalue() == ""


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": HOSTILE})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.rstrip("\n").isprintable()


def test_errors_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    error = InputFileError(f"{HOSTILE} is corrupt", "leave it out")
    assert str(error) == "[/x] a[red]b :smile: \\x1b[31m\\x07\\u202e\\ud800 error: forged is corrupt; leave it out"
    logger = shown_logger("reap_serve")
    assert shown_logger("reap_serve") is logger
    with caplog.at_level(logging.WARNING, "reap_serve"):
        logger.warning("lost: %s", HOSTILE)
    assert caplog.messages == [f"lost: {SHOWN}"]


def test_the_consoles_are_the_only_ones() -> None:
    assert stderr.render_str(HOSTILE, markup=True, emoji=True).plain == SHOWN
