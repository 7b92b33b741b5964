"""Runs evaluation tools against an endpoint, where they are installed; what they measure is theirs.

A run is asked for as `TOOL:TASK[,TASK...] [further options of the tool]`:

| tool | command | what it asks |
|---|---|---|
| `lm-eval` | `lm_eval run --model local-completions` | /v1/completions: log-probabilities and answers |
| `lm-eval-chat` | `lm_eval run --model local-chat-completions` | /v1/chat/completions: answers alone |
| `evalplus` | `evalplus.evaluate --backend openai` | chats; runs the code that the model writes on this machine |
| `bfcl` | `bfcl generate`, `bfcl evaluate` | needs `--model`, a name of its own list that says how to ask |
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reap_serve.compare.task_results import TaskScore, read_task_results
from reap_serve.errors import EngineError, RequestError

CONCURRENT_REQUESTS = 8


@dataclass(frozen=True, slots=True)
class TaskRun:
    """What one tool shall measure.

    Attributes:
        tool: A key of `TOOLS`.
        tasks: As the tool calls them.
        options: Further options of the tool.
    """

    tool: str
    tasks: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """How to run a tool.

    Attributes:
        program: Its command.
        package: What to install.
        commands: The command lines, without the program, for a run, the endpoint's `http://host:port`, its model and a
            directory for results.
    """

    program: str
    package: str
    commands: Callable[[TaskRun, str, str, Path], Sequence[Sequence[str]]]


def _lm_eval(kind: str, path: str) -> Callable[[TaskRun, str, str, Path], Sequence[Sequence[str]]]:
    def commands(run: TaskRun, url: str, model: str, results: Path) -> Sequence[Sequence[str]]:
        # lm-eval finds the tokenizer itself: the endpoint's own where vLLM was started with
        # --enable-tokenizer-info-endpoint, else by the model's name through transformers.
        described = {
            "model": model,
            "base_url": f"{url}{path}",
            "num_concurrent": str(CONCURRENT_REQUESTS),
            "tokenized_requests": "False",
        }
        arguments = ",".join(f"{key}={value}" for key, value in described.items())
        return [
            [
                *("run", "--model", kind, "--model_args", arguments, "--tasks", ",".join(run.tasks)),
                *("--output_path", str(results), "--log_samples", *run.options),
                *(["--apply_chat_template"] if kind == "local-chat-completions" else []),
            ]
        ]

    return commands


def _evalplus(run: TaskRun, url: str, model: str, results: Path) -> Sequence[Sequence[str]]:
    return [
        [
            *("--model", model, "--dataset", task, "--backend", "openai", "--base-url", f"{url}/v1"),
            *("--greedy", "--root", str(results), *run.options),
        ]
        for task in run.tasks
    ]


def _bfcl(run: TaskRun, url: str, model: str, results: Path) -> Sequence[Sequence[str]]:
    local = ("--local-model-path", model) if Path(model).is_dir() else ()
    shared = ("--test-category", ",".join(run.tasks), "--result-dir", str(results / "result"))
    # Of the options of `generate`, `evaluate` knows the model alone; of single entries it has to be told.
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--model")
    known, _ = asked.parse_known_args(run.options)
    evaluated = () if known.model is None else ("--model", known.model)
    partial = ("--partial-eval",) if "--run-ids" in run.options else ()
    return [
        ["generate", "--skip-server-setup", *local, *shared, *run.options],
        ["evaluate", "--score-dir", str(results / "score"), *shared, *evaluated, *partial],
    ]


TOOLS: dict[str, Tool] = {
    "lm-eval": Tool("lm_eval", "lm-eval[api]", _lm_eval("local-completions", "/v1/completions")),
    "lm-eval-chat": Tool("lm_eval", "lm-eval[api]", _lm_eval("local-chat-completions", "/v1/chat/completions")),
    "evalplus": Tool("evalplus.evaluate", "evalplus", _evalplus),
    "bfcl": Tool("bfcl", "bfcl-eval", _bfcl),
}


def parse_task_runs(texts: Sequence[str]) -> tuple[TaskRun, ...]:
    """Runs as the user wrote them.

    Raises:
        RequestError: One is not of the form, or its tool is unknown or not installed.
    """
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> TaskRun:
    words = shlex.split(text)
    name, _, tasks = (words[0] if words else "").partition(":")
    if name not in TOOLS or not all(tasks.split(",")):
        raise RequestError(f"--tasks {text!r} is not TOOL:TASK", f"tools are {', '.join(TOOLS)}; such as lm-eval:gsm8k")
    tool = TOOLS[name]
    if _program(tool) is None:
        raise RequestError(f"{tool.program} is not installed", f"pip install '{tool.package}', or --task-results")
    return TaskRun(name, tuple(tasks.split(",")), tuple(words[1:]))


def _program(tool: Tool) -> str | None:
    """Its path: beside this interpreter, else on PATH, where it may have an environment of its own."""
    return shutil.which(tool.program, path=str(Path(sys.executable).parent)) or shutil.which(tool.program)


def run_tasks(runs: Sequence[TaskRun], url: str, model: str, api_key: str | None) -> tuple[TaskScore, ...]:
    """Runs the tools one after the other; their files are removed when their scores are read.

    Args:
        runs: What to run.
        url: `http://host:port` of an OpenAI endpoint.
        model: Name of its model.
        api_key: Bearer token; None for none.

    Raises:
        EngineError: A tool stopped.
        InputFileError: It wrote no result.
    """
    scores: list[TaskScore] = []
    for run in runs:
        with tempfile.TemporaryDirectory(prefix="reap-serve-tasks-") as folder:
            for command in TOOLS[run.tool].commands(run, url, model, Path(folder)):
                _execute(TOOLS[run.tool], command, _environment(url, api_key, folder))
            scores += read_task_results(Path(folder))
    return tuple(scores)


def _execute(tool: Tool, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    program = _program(tool)
    assert program is not None
    # In the user's own directory: the model and the options may name paths from there.
    done = subprocess.run([program, *arguments], env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise EngineError(f"{tool.program} stopped: {lines[-1][:300]}", f"run it alone: {shlex.join(arguments)[:300]}")


def _environment(url: str, api_key: str | None, folder: str) -> dict[str, str]:
    key = api_key or "EMPTY"
    return {
        # bfcl keeps its locks here, else beside its package.
        "BFCL_PROJECT_ROOT": folder,
        **os.environ,
        "OPENAI_API_KEY": key,
        "REMOTE_OPENAI_BASE_URL": f"{url}/v1",
        "REMOTE_OPENAI_API_KEY": key,
    }
