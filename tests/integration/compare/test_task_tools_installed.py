"""evalplus and bfcl-eval themselves, against an endpoint whose answers are known: they find what was planted.

Each is tested where it is installed; it may have an environment of its own, whose programs are on PATH. Neither needs a
network: bfcl-eval brings its questions, and evalplus is given problems.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stub_endpoint import StubEndpoint

from reap_serve.compare.recovery import task_reports
from reap_serve.compare.task_results import TaskScore
from reap_serve.compare.task_tools import parse_task_runs, run_tasks

MODEL = Path(str(resources.files("reap_serve"))) / "demo" / "tiny_moe" / "model"
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "x"}}\n</tool_call>'
# evalplus wants all 164 problems of HumanEval.
PROBLEMS = 164

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Answering(StubEndpoint):
    """An endpoint that says what a function of the prompt says.

    Attributes:
        say: From the last message of a chat, or from a prompt, to the answer.
        said: The answers given.
    """

    say: Callable[[str], str] = str
    said: dict[str, str] = field(default_factory=dict)

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return super().respond(path, body)
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        text = self.said[prompt] = self.say(prompt)
        choice = {"index": 0, "finish_reason": "stop", "text": text, "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return 200, json.dumps({"id": "1", "object": "", "created": 0, "choices": [choice], "usage": usage}).encode()


def measure(run: str, say: Callable[[str], str], model: str) -> tuple[tuple[TaskScore, ...], Answering]:
    with Answering(np.zeros((1, 1)), say=say) as endpoint:
        return run_tasks(parse_task_runs([run]), endpoint.url, model, None), endpoint


@pytest.mark.skipif(shutil.which("bfcl") is None, reason="bfcl-eval is not installed")
@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="the embedded model is not installed")
def test_bfcl_finds_the_calls_that_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    # A model named by a path from where the user is.
    monkeypatch.chdir(MODEL.parent)
    run = "bfcl:live_relevance --model Qwen/Qwen3-0.6B-FC --num-threads 4"
    # Any call is relevant; half of the candidate's answers hold one.
    one, asked = measure(run, lambda prompt: CALL, MODEL.name)
    half = set(sorted(asked.said)[::2])
    other, _ = measure(run, lambda prompt: CALL if prompt in half else "I cannot tell.", MODEL.name)
    (report,) = task_reports(one, other)
    print(report)
    assert (report.tool, report.task, report.metric, report.method) == ("bfcl", "live_relevance", "accuracy", "pairs")
    assert (report.items, report.base, report.candidate) == (len(asked.said), 1.0, len(half) / len(asked.said))
    assert report.recovery_interval is not None
    low, high = report.recovery_interval
    assert 0.0 < low < 100.0 * report.candidate < high < 100.0


def write_problems(path: Path) -> None:
    """Sums in place of HumanEval's problems, two base tests and one further."""
    problems = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def add_{number}(x):\n    """Adds {number} to x."""\n',
            "entry_point": f"add_{number}",
            "canonical_solution": f"    return x + {number}\n",
            "contract": "",
            "base_input": [[1], [2]],
            "plus_input": [[3]],
            "atol": 0,
        }
        for number in range(PROBLEMS)
    ]
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def solve(prompt: str, wrong_every: int, careless_every: int) -> str:
    """Some solutions fail every test, some the further one alone."""
    found = re.search(r"def add_(\d+)", prompt)
    assert found is not None
    number = int(found[1])
    value = f"x + {number}"
    if number % careless_every == 1:
        value += " if x < 3 else 0"
    if number % wrong_every == 0:
        value = "None"
    return f"```python\ndef add_{number}(x):\n    return {value}\n```"


@pytest.mark.skipif(shutil.which("evalplus.evaluate") is None, reason="evalplus is not installed")
def test_evalplus_finds_the_solutions_that_were_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_problems(tmp_path / "problems.jsonl")
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(tmp_path / "problems.jsonl"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = "evalplus:humaneval --parallel 2"
    base, _ = measure(run, lambda prompt: solve(prompt, PROBLEMS, 10), "base")
    candidate, _ = measure(run, lambda prompt: solve(prompt, 4, 10), "candidate")
    first, further = task_reports(base, candidate)
    print(first, further, sep="\n")
    assert (first.tool, first.task, first.metric, first.items) == ("evalplus", "HumanEval", "pass@1", PROBLEMS)
    # Problem 0 is wrong in the base, 41 of 164 in the candidate.
    assert (first.base, first.candidate) == (163 / 164, 123 / 164)
    # 17 more, which end in 1, fail the further test; none of them is divisible by 4.
    assert (further.base, further.candidate) == (146 / 164, 106 / 164)
    for report in (first, further):
        recovered = 100 * report.candidate / report.base
        assert (report.method, report.recovery_percent) == ("pairs", pytest.approx(recovered))
        assert report.recovery_interval is not None
        assert report.recovery_interval[0] < recovered < report.recovery_interval[1] < 100
