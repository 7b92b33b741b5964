"""`observe` reads its traffic to the end before an engine starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reap_serve.adapter import offline
from reap_serve.cli.app import _register, app
from reap_serve.cli.boundary import run_command
from reap_serve.demo.run import demo_files

LINE = '{"model": "m", "messages": [{"role": "user", "content": "a"}]}\n'


class StartedError(Exception):
    """An engine would have started."""


@pytest.fixture
def observe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `observe` on a file of these lines, with these options, up to the engine."""

    def start(*arguments: object) -> None:
        raise StartedError

    monkeypatch.setattr(offline, "observe_traffic", start)
    _register()

    def run(text: str, *options: str) -> int:
        (tmp_path / "traffic.jsonl").write_text(text)
        words = ["observe", str(demo_files().model), str(tmp_path / "traffic.jsonl"), "--output", str(tmp_path / "s")]
        return run_command(lambda: app(args=[*words, *options], standalone_mode=False), debug=False)

    return run


def test_a_wrong_line_is_told_before_an_engine_starts(
    observe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert observe(LINE * 3 + "{broken\n") == 2
    assert "traffic.jsonl:4: " in capsys.readouterr().err


def test_right_lines_start_one(observe: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert observe(LINE * 3) == 1
    assert "StartedError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--skip-malformed"], 1), (["--no-skip-malformed"], 2), (["--skip-malformed", "--no-skip-malformed"], 2)],
)
def test_the_default_has_the_name_that_the_first_release_gave_it(
    observe: Callable[..., int], options: list[str], code: int
) -> None:
    assert observe(LINE * 3 + "{broken\n", *options) == code
