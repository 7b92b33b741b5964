"""The program as scripts meet it: one line an error, the right exit code, answers without waiting."""

from __future__ import annotations

import itertools
import os
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


def test_help_imports_little() -> None:
    """0.5 s is the promise: kept by what is imported, which no busy machine changes."""
    code = "import sys, reap_serve.cli.app as app; app._register(); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    heavy = {"torch", "vllm", "transformers", "numpy", "pydantic", "httpx", "openai", "safetensors", "scipy", "jinja2"}
    assert not heavy & set(loaded)
    assert len(loaded) < 600


def test_help_shows_the_loop_and_the_commands_in_the_order_of_use() -> None:
    text = reap_serve("--help").stdout
    loop = [f" reap-serve {command} " for command in ("observe", "plan", "prune", "verify", "compare")]
    places = [text.index(line) for line in loop]
    assert places == sorted(places)
    commands = text[text.index("Commands") :]
    listed = [commands.index(f"│ {name} ") for name in ("observe", "plan", "prune", "verify", "compare", "doctor")]
    assert listed == sorted(listed)


@pytest.mark.parametrize("command", ["tune", "observe", "compare"])
def test_help_fits_a_terminal_of_80_columns(command: str) -> None:
    """Nothing of an option is cut, a sentence breaks only at the margin, options of traffic stand in one panel."""
    text = subprocess.run(
        [sys.executable, "-m", "reap_serve", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    ).stdout
    assert "…" not in text
    prose = [line.strip() for line in text[: text.index("╭")].splitlines()]
    for line, following in itertools.pairwise(prose):
        assert not (line and following) or len(line) > 60, line
    options = ("--skip-malformed", "--trust-request-chat-template")
    (panel,) = [each for each in text.split("╭─ ") if any(option in each for option in options)]
    assert panel.startswith("Traffic")


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [(("pruen", "a"), "prune"), (("plan", "a", "--keep-fracton", "0.5"), "--keep-fraction")],
)
def test_what_is_misspelt_is_answered_by_the_nearest(arguments: tuple[str, ...], nearest: str) -> None:
    done = reap_serve(*arguments)
    assert done.returncode == 2
    assert nearest in done.stderr


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
