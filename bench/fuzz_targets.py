"""What the fuzzer feeds with damaged inputs, and what a sound answer to one looks like."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from fuzz_inputs import Inputs
from typer.main import get_command

from reap_serve.cli.app import _register, app
from reap_serve.cli.boundary import run_command

Words = list[str]
Prepare = Callable[[Inputs, Path, random.Random], list[Words]]
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SPARE = ("LICENSE", "tokenizer.json", "generation_config.json")


@dataclass(slots=True)
class Case:
    """One damaged input: the directory it lies in, the sound files, and what was found wrong."""

    home: Path
    sound: Path
    findings: list[str] = field(default_factory=list)


def statistics(inputs: Inputs, home: Path, random_: random.Random) -> list[Words]:
    """Statistics, shown, merged, compared, exported and planned from."""
    file, sound = home / "in.safetensors", home.parent / "sound" / "other.safetensors"
    file.write_bytes(inputs.damaged_statistics(random_))
    out = home / "out"
    export = ["stats", "export", str(file), "--output", str(out)]
    return [
        ["stats", "show", str(file), *random_.choice(([], ["--json"], ["--layer", "0"], ["--criterion", "msan"]))],
        random_.choice(
            (
                ["stats", "merge", str(file), str(sound), "--output", str(out), "--json"],
                ["stats", "diff", str(file), str(sound), "--json"],
                ["stats", "drift", str(sound), str(file), "--json"],
                ["plan", str(file), "--keep-fraction", "0.5", "--output", str(out), "--json"],
                ["plan", str(file), "--sweep", "0.25,0.5", "--json"],
                ["plan", str(file), str(sound), "--keep-experts", "2", "--objective", "max-min", "--output", str(out)],
                [*export, "--format", "reap"],
                [*export, "--format", "llm-compressor", "--keep-experts", "2"],
            )
        ),
    ]


def plans(inputs: Inputs, home: Path, random_: random.Random) -> list[Words]:
    """A plan, shown, drawn, compared and pruned by."""
    file, sound = home / "plan.json", home.parent / "sound" / "plan.json"
    file.write_bytes(inputs.damaged_plan(random_))
    return [
        ["plan", "show", str(file), *random_.choice(([], ["--json"]))],
        random_.choice(
            (
                ["plan", "diff", str(sound), str(file)],
                ["plan", "plot", str(file), "--output", str(home / "out")],
                ["prune", str(inputs.model), str(file), str(home / "out"), "--json"],
                ["prune", str(inputs.model), str(file), str(home / "out"), "--unequal-layers"],
            )
        ),
    ]


def _checkpoint(inputs: Inputs, home: Path, name: str, content: bytes, random_: random.Random) -> list[Words]:
    model, plan = home / "model", home.parent / "sound" / "plan.json"
    model.mkdir()
    for file in inputs.model.iterdir():
        if file.name != name:
            os.link(file, model / file.name)
    (model / name).write_bytes(content)
    text = plan.read_text()
    # A plan that is bound to another model is refused at once: most are bound to none.
    free = home / "plan.json"
    free.write_text(json.dumps(json.loads(text) | {"model": {}} if random_.random() < 0.8 else json.loads(text)))
    out = home / "out"
    return [
        ["prune", str(model), str(free), str(out), "--json"],
        random_.choice(
            (
                ["verify", str(model), "--json"],
                ["verify", str(out), "--source", str(model), "--plan", str(free)],
                ["plan", str(home.parent / "sound" / "other.safetensors"), "--model", str(model), "--sweep", "0.5"],
            )
        ),
    ]


def headers(inputs: Inputs, home: Path, random_: random.Random) -> list[Words]:
    """A weight file of a checkpoint that is pruned and verified."""
    name = random_.choice(WEIGHTS)
    return _checkpoint(inputs, home, name, inputs.damaged_weights(name, random_), random_)


def indices(inputs: Inputs, home: Path, random_: random.Random) -> list[Words]:
    """Its index."""
    return _checkpoint(inputs, home, "model.safetensors.index.json", inputs.damaged_index(random_), random_)


def configs(inputs: Inputs, home: Path, random_: random.Random) -> list[Words]:
    """Its config.json."""
    return _checkpoint(inputs, home, "config.json", inputs.damaged_config(random_), random_)


def traffic(inputs: Inputs, home: Path, random_: random.Random) -> list[Words]:
    """Recorded traffic, counted, converted and sampled."""
    file = home / "traffic.jsonl"
    file.write_bytes(inputs.damaged_traffic(random_))
    skip = ["--skip-malformed"] if random_.random() < 0.5 else []
    return [
        ["traffic", "show", str(file), *skip, *random_.choice(([], ["--json"]))],
        random_.choice(
            (
                ["traffic", "convert", str(file), *skip, "--output", str(home / "out")],
                ["traffic", "sample", str(file), *skip, "--tokens", "5", "--output", str(home / "out"), "--json"],
            )
        ),
    ]


def imports(inputs: Inputs, home: Path, random_: random.Random) -> list[Words]:
    """Files of other tools; what was imported is shown."""
    file, out = home / "foreign", home / "out"
    form = random_.choice(("reap", "llm-compressor"))
    file.write_bytes(inputs.damaged_observer(random_) if form == "reap" else inputs.damaged_report(random_))
    command = ["stats", "import", str(file), "--model", str(inputs.model), "--format", form, "--output", str(out)]
    return [command, ["stats", "show", str(out), "--json"]]


TARGETS: dict[str, Prepare] = {
    "statistics": statistics,
    "plans": plans,
    "headers": headers,
    "indices": indices,
    "configs": configs,
    "traffic": traffic,
    "imports": imports,
}


def run_case(case: Case, target: Prepare, inputs: Inputs, random_: random.Random) -> None:
    """Runs one damaged input through its commands and notes what is wrong with the answers."""
    try:
        commands = target(inputs, case.home, random_)
    except (RuntimeError, UnicodeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # A damage that cannot be written down; the next input is another one.
        case.findings.append(f"skipped: {type(error).__name__}: {error}")
        return
    imported = False
    for words in commands:
        before = _listing(case.home)
        with _captured() as (out, err):
            code = _exit_code(words)
        findings = list(judged(words, code, out(), err()))
        if any("this is a defect" in finding for finding in findings):
            with _captured() as (_, trace):
                _exit_code(words, debug=True)
            findings.append(trace()[-1500:])
        case.findings += [f"{' '.join(words)}: {finding}" for finding in findings]
        after = _listing(case.home)
        _judge_files(case, words, code, before, after)
        if words[:2] == ["stats", "import"]:
            imported = code == 0
        elif imported and code != 0:
            case.findings.append(f"{' '.join(words)}: what was imported is not shown: {err()[:300]}")


@cache
def _program() -> Callable[..., object]:
    """What `main` runs, put together once: that takes longer than most commands."""
    _register()
    return get_command(app)


def _exit_code(words: Words, debug: bool = False) -> int | str:
    try:
        return run_command(lambda: _program()(args=words, prog_name="reap-serve", standalone_mode=False), debug=debug)
    except BaseException as error:  # noqa: BLE001 - what passes the program's boundary is a finding
        return f"{type(error).__name__}: {error}"


def judged(words: Words, code: int | str, out: str, err: str) -> Iterator[str]:
    """What is wrong with an answer."""
    if code not in (0, 1, 2):
        yield f"exit {code}"
    for sign in ("this is a defect", "Traceback", "the memory does not suffice"):
        if sign in err:
            yield f"{sign}: {err[-400:]}"
    lines = err.splitlines()
    if code == 2 and not (lines and lines[-1].startswith("error: ") and "; " in lines[-1]):
        yield f"exit 2 without an error line: {err[-200:]!r}"
    if sum(line.startswith("error: ") for line in lines) > 1:
        yield f"two error lines: {err[-300:]!r}"
    if not (out + err).replace("\n", "").isprintable():
        yield "a control character was printed"
    if "--json" in words and code == 0:
        try:
            json.loads(out, parse_constant=_no_constant)
        except ValueError as error:
            yield f"no JSON: {error}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _judge_files(case: Case, words: Words, code: int | str, before: set[str], after: set[str]) -> None:
    out = {name for name in after if name == "out" or name.startswith("out/")}
    strange = (after ^ before) - out
    if strange:
        case.findings.append(f"{' '.join(words)}: files beside the output: {sorted(strange)[:4]}")
    if code != 0 and (out - before):
        case.findings.append(f"{' '.join(words)}: exit {code} and an output: {sorted(out)[:4]}")


def _listing(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*")}


@contextmanager
def _captured() -> Iterator[tuple[Callable[[], str], Callable[[], str]]]:
    kept = sys.stdout, sys.stderr
    streams = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    sys.stdout, sys.stderr = streams

    def text_of(stream: io.TextIOWrapper) -> Callable[[], str]:
        def text() -> str:
            stream.flush()
            return stream.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]

        return text

    try:
        yield text_of(streams[0]), text_of(streams[1])
    finally:
        sys.stdout, sys.stderr = kept


def fresh_home(root: Path) -> Path:
    """An empty directory for one input."""
    home = root / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    return home
