"""Every command of every README: the program takes its options and arguments, the files, modules and targets are there.

The shell itself takes the blocks apart, with no program on its path: loops, variables and quotes are what bash makes of
them, and nothing is run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import textwrap
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

ROOT = Path(__file__).parents[2]
# Where texts for readers are; tables that benches write name no command but their own.
TEXTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for folder in ("bench", "deploy", "patches", "reap_serve") for path in (ROOT / folder).rglob("*.md")),
    ]
)
TEXTS.remove(ROOT / "CHANGELOG.md")
# What `serve` hands on to vLLM.
OF_VLLM = {"--host", "--port"}
# A block may stand in a list.
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# Paths from the top, and modules by the folder in which they are or by their name alone.
_PATHS = re.compile(r"`((?:(?:reap_serve|tests|bench|deploy|patches)/[\w./-]+)|[\w/]+\.py)`")
# One write each: the commands of a pipeline run at once.
_RECORD = """
command_not_found_handle() { printf '%s\\037' "$@" $'\\036' >&3; }
enable -n test
"""


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [textwrap.dedent(text) for name, text in _FENCE.findall(path.read_text()) if name == language]


def commands_of(script: str, folder: Path) -> list[list[str]]:
    """The words of every command that bash would have run."""
    record = folder / "commands"
    with record.open("wb") as stream:
        bash = shutil.which("bash")
        assert bash is not None
        done = subprocess.run(
            [bash, "--norc", "-c", f"exec 3>&{stream.fileno()}; PATH=/nowhere\n{_RECORD}\n{script}"],
            cwd=folder,
            pass_fds=[stream.fileno()],
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert "syntax error" not in done.stderr, done.stderr
    return [line.split("\x1f")[:-1] for line in record.read_text().split("\x1e\x1f")[:-1]]


def inline_commands(path: Path) -> list[list[str]]:
    """Commands between single backticks, which may leave out the program's name and their arguments."""
    prose = _FENCE.sub("", path.read_text())
    found = []
    for text in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose):
        try:
            words = shlex.split(text)
        except ValueError:
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if len(words) > 1 and (words[0] in {"reap-serve", "make", "pytest"} or words[:2] == ["python", "-m"]):
            found.append(words)
        elif len(words) > 1 and words[0] in program().commands and any(word.startswith("--") for word in words):
            found.append(["reap-serve", *words])
    return found


@cache
def program() -> TyperGroup:
    """The whole program with its commands."""
    from reap_serve.cli.app import _register, app

    _register()
    found = typer.main.get_command(app)
    assert isinstance(found, TyperGroup)
    return found


def command_of(words: list[str]) -> tuple[TyperCommand, list[str]]:
    """The command that words name, and those that are left for it."""
    command, rest = program(), list(words)
    while isinstance(command, TyperGroup):
        # `plan STATS...` stands for `plan make STATS...`.
        command = command.commands[rest.pop(0) if rest and rest[0] in command.commands else "make"]
    return command, rest


def require_options(words: list[str]) -> None:
    """Every option is one of the command."""
    if words[0] not in program().commands:
        assert words in (["COMMAND", "--help"], ["[cpu]"]), words
        return
    command, rest = command_of(words)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in rest if re.match(r"--\w", word)}
    assert given - OF_VLLM <= known, f"{' '.join(words)}: {given - OF_VLLM - known} is no option"


def require_parsed(words: list[str]) -> None:
    """The program's own parser takes the whole line."""
    command, rest = command_of(words)
    rest = [word for word in rest if word not in OF_VLLM]
    command.make_context("reap-serve", rest)


def require_there(words: list[str]) -> None:
    """What another program is given by these words is in this repository."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
    elif words[:2] == ["python", "-m"]:
        spec = importlib.util.find_spec(words[2])
        assert spec is not None, words
        assert spec.origin is not None
        source = Path(spec.origin)
        source = source.with_name("__main__.py") if source.name == "__init__.py" else source
        given = [word for word in words[3:] if word.startswith("--")]
        folder = "\n".join(path.read_text() for path in source.parent.glob("*.py"))
        for option in given:
            assert f'"{option}"' in folder, f"{option} of {words[2]}"
    elif words[0] == "pytest":
        for word in words[1:]:
            if "/" in word:
                assert (ROOT / word.partition("::")[0]).exists(), word
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words[2:]:
            if named := re.fullmatch(r"reap-serve(?:\[(.+)\])?", word):
                assert {name for name in (named[1] or "").split(",") if name} <= set(extras), word


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_blocks(path: Path, tmp_path: Path) -> None:
    for block in blocks(path, "bash"):
        found = commands_of(block, tmp_path)
        assert found, block
        for words in found:
            if words[0] == "reap-serve":
                require_parsed(words[1:])
            else:
                require_there(words)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_within_sentences(path: Path) -> None:
    for words in inline_commands(path):
        if words[0] == "reap-serve":
            require_options(words[1:])
        else:
            require_there(words)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_are_there(path: Path) -> None:
    text = _FENCE.sub("", path.read_text())
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    for link in links:
        assert (path.parent / link).exists(), link
    # Words in capitals stand for what the reader puts there.
    named = {name for name in _PATHS.findall(text) if not re.search(r"(?<![A-Za-z])[A-Z]{2,}", name)}
    missing = {name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "reap_serve"))}
    places = (path.parent, ROOT / "tests" / "unit", ROOT / "tests" / "integration")
    assert not {name for name in missing if not any(found for root in places for found in root.rglob(name))}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_stand_in_fences(path: Path) -> None:
    """What is only indented would be looked at by no test."""
    assert not re.search(r"^    (reap-serve|python|make|pip|vllm) ", _FENCE.sub("", path.read_text()), re.MULTILINE)


def test_the_first_readme_is_short() -> None:
    """150 lines, and no cell of a table that has to be scrolled."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")]
    assert max(map(len, cells)) <= 100


def test_the_readmes_name_commands_at_all(tmp_path: Path) -> None:
    """The tests above find something to look at."""
    found = [words[1] for path in TEXTS for block in blocks(path, "bash") for words in commands_of(block, tmp_path)
             if words[0] == "reap-serve"]  # fmt: skip
    assert {
        "observe",
        "stats",
        "plan",
        "prune",
        "verify",
        "compare",
        "serve",
        "tune",
        "cycle",
        "merge",
        "doctor",
    } <= set(found)


def test_a_loop_of_the_shell_is_taken_apart(tmp_path: Path) -> None:
    script = "for f in 1 2; do reap-serve plan s --keep-experts $f --output 'a b'; done | tee $(ls)"
    assert [words for words in commands_of(script, tmp_path) if words[0] == "reap-serve"] == [
        ["reap-serve", "plan", "s", "--keep-experts", number, "--output", "a b"] for number in "12"
    ]
    assert os.listdir(tmp_path) == ["commands"]


@pytest.mark.parametrize(
    "words", [["prune", "MODEL"], ["plan", "s", "--keep-experts", "x", "-o", "p"], ["verify", "a", "b"]]
)
def test_a_wrong_line_is_found(words: list[str]) -> None:
    with pytest.raises(typer.TyperException):
        require_parsed(words)


def test_the_configuration_of_a_cycle_is_read(tmp_path: Path) -> None:
    from reap_serve.cycle.config import read_config

    (block,) = blocks(ROOT / "reap_serve" / "cycle" / "README.md", "toml")
    (tmp_path / "cycle.toml").write_text(block)
    (tmp_path / "heldout.jsonl").write_text("{}\n")
    config = read_config(tmp_path / "cycle.toml")
    assert config.choose.keep_fraction == 0.75


def test_the_declaration_of_a_sum() -> None:
    from dataclasses import make_dataclass

    from reap_serve.statistics import sums

    (block,) = blocks(ROOT / "reap_serve" / "statistics" / "README.md", "python")
    names: dict[str, object] = {**vars(sums), "field": __import__("dataclasses").field}
    exec(block, names)
    annotations, name = names["__annotations__"], "gate_sq_sum_SPLE"
    assert isinstance(annotations, dict)
    assert make_dataclass("Sums", [(name, annotations[name], names[name])])().gate_sq_sum_SPLE is None


def test_the_callback_of_litellm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is read as a record of LiteLLM."""
    import asyncio
    import sys
    import types

    from reap_serve.traffic.read import read_traffic

    (block,) = blocks(ROOT / "reap_serve" / "traffic" / "README.md", "python")
    custom_logger = types.ModuleType("litellm.integrations.custom_logger")
    custom_logger.CustomLogger = type("CustomLogger", (), {})  # type: ignore[attr-defined]
    for name in ("litellm", "litellm.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, custom_logger.__name__, custom_logger)
    path = tmp_path / "litellm.jsonl"
    assert "/var/lib/capture/litellm.jsonl" in block
    names: dict[str, object] = {}
    exec(block.replace("/var/lib/capture/litellm.jsonl", str(path)), names)
    record = {
        "id": "a", "call_type": "acompletion", "model": "m", "status": "success",
        "messages": [{"role": "user", "content": "hello"}],
        "response": {"choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]},
    }  # fmt: skip
    asyncio.run(names["lines"].async_log_success_event({"standard_logging_object": record}, None, 0, 0))  # type: ignore[attr-defined]
    (request,) = read_traffic([str(path)])
    assert request.origin.format == "litellm"
