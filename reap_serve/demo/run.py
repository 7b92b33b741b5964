"""The loop on the embedded model: observe one domain, plan, prune, verify, serve by stock vLLM, compare with the base.

Each step but the last is the very command that a user would run. Three plans of the same size are compared: `reap`,
`frequency` (the most used experts) and `random`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from reap_serve.compare.assemble import Candidate, report
from reap_serve.compare.measure import CompareSettings, Measured, measure, prepare
from reap_serve.compare.record import Report
from reap_serve.compare.side import Side, experts_of, open_side
from reap_serve.compare.write import fill_directory
from reap_serve.errors import EngineError, InputFileError
from reap_serve.plan.record import read_plan
from reap_serve.records import JsonValue, Record
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.request import Request

DOMAINS = ("code", "prose", "german", "tools", "arithmetic")
OBSERVED_DOMAIN = "code"
CRITERIA = ("reap", "frequency", "random")
KEEP_FRACTION = 0.5
REQUESTS_PER_DOMAIN = 40
SERVER_ARGUMENTS = (
    *("--enforce-eager", "--max-model-len", "1024"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
SETTINGS = CompareSettings(
    server_arguments=SERVER_ARGUMENTS, max_answer_tokens=64, answers_per_slice=8, latency_requests=20
)


class DomainRow(Record):
    """Held-out perplexity of one domain.

    Attributes:
        domain: Its name.
        observed: Whether the plans were made from this domain's traffic.
        base: Of the whole model.
        pruned: Of the pruned ones, by criterion.
    """

    domain: str
    observed: bool
    base: float
    pruned: dict[str, float]


class DemoResult(Record):
    """What the demo made.

    Attributes:
        artifacts: Paths by name.
        table: One row a domain.
        question: What the pruned model was asked through the openai client.
        answer: What it answered.
        compare: The report on `reap` against the base.
    """

    artifacts: dict[str, str]
    table: tuple[DomainRow, ...]
    question: str
    answer: str
    compare: Report

    def at(self, made: Path, published: Path) -> DemoResult:
        """The same with the paths of the directory under its final name."""
        text = self.model_dump_json().replace(str(made), str(published))
        return DemoResult.model_validate_json(text)


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The embedded model and its traffic."""

    model: Path
    traffic: Path

    def calibration(self, domain: str) -> Path:
        """Traffic to observe."""
        return self.traffic / f"{domain}.calibration.jsonl"

    def heldout(self, domain: str) -> Path:
        """Traffic that neither the model nor the plans have seen."""
        return self.traffic / f"{domain}.heldout.jsonl"


def demo_files() -> DemoFiles:
    """Where the package keeps the embedded model.

    Raises:
        InputFileError: The package was installed without it.
    """
    root = Path(str(resources.files("reap_serve.demo"))) / "tiny_moe"
    if not (root / "model" / "config.json").is_file():
        raise InputFileError(f"the embedded model is not at {root}", "install the package with its data")
    return DemoFiles(root / "model", root / "traffic")


def run_demo(output: Path, say: Callable[[str], None]) -> DemoResult:
    """Runs the loop; OUTPUT is a directory that exists.

    Args:
        output: Where every artifact goes.
        say: Shows a line of progress.

    Raises:
        ReapServeError: A step failed.
    """
    files = demo_files()
    # The machine may be small and the model is: one GiB of KV cache is plenty.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    stats = output / f"{OBSERVED_DOMAIN}.stats.safetensors"
    say(f"1/5 observe: the {OBSERVED_DOMAIN} traffic runs through vLLM, every expert's gate and output norm is summed")
    _command(say, "observe", files.model, files.calibration(OBSERVED_DOMAIN), "--output", stats)
    say("2/5 plan and prune: half of the experts of every layer stay, chosen by three criteria")
    plans, models = {}, {}
    for criterion in CRITERIA:
        plans[criterion], models[criterion] = output / f"{criterion}.plan.json", output / f"model-{criterion}"
        _command(
            say, "plan", stats, "--keep-fraction", KEEP_FRACTION, "--criterion", criterion, "--output", plans[criterion]
        )
        _command(say, "prune", files.model, plans[criterion], models[criterion])
    say("3/5 verify: the pruned checkpoint against every byte it was made from")
    _command(say, "verify", models["reap"], "--source", files.model, "--plan", plans["reap"])
    say("4/5 serve: base and pruned models by stock vLLM, no plugin loaded; held-out requests of all domains")
    requests = _requests(files)
    with open_side(str(files.model), SERVER_ARGUMENTS) as side:
        cases = prepare(side, requests, SETTINGS)
        base = measure(side, cases, SETTINGS, lambda: None, again=True)
    say(f"    base: {side.memory.start_seconds:.0f} s to start, {len(cases.forced)} requests scored")
    measured: dict[str, Measured] = {}
    answer = ""
    question = _question(requests)
    for criterion in CRITERIA:
        with open_side(str(models[criterion]), SERVER_ARGUMENTS) as side:
            if criterion == "reap":
                answer = _ask(side, question)
                measured[criterion] = measure(side, cases, SETTINGS, lambda: None)
            else:
                measured[criterion] = measure(side, cases.without_load(), SETTINGS, lambda: None)
        say(f"    {criterion}: {side.memory.start_seconds:.0f} s to start")
    say("5/5 compare")
    candidates = [
        Candidate(models[criterion].name, False, experts_of(str(models[criterion])), found.memory.weights_bytes, found)
        for criterion, found in measured.items()
    ]
    comparison = report("the embedded model", models["reap"].name, cases, base, measured["reap"], SETTINGS, candidates)
    written = fill_directory(comparison, output, plan=read_plan(plans["reap"]))
    say(f"    report: {written[-1]}")
    artifacts = {
        "model": str(files.model),
        "stats": str(stats),
        **{f"plan_{criterion}": str(plans[criterion]) for criterion in CRITERIA},
        **{f"model_{criterion}": str(models[criterion]) for criterion in CRITERIA},
        **{"report" if path.suffix == ".json" else "report_html": str(path) for path in written},
    }
    return DemoResult(
        artifacts=artifacts,
        table=_table(comparison),
        question=str(question.body["messages"][-1]["content"]),  # type: ignore[index,call-overload]
        answer=answer,
        compare=comparison,
    )


def _requests(files: DemoFiles) -> list[Request]:
    requests: list[Request] = []
    for domain in DOMAINS:
        requests += islice(read_traffic([str(files.heldout(domain))]), REQUESTS_PER_DOMAIN)
    return requests


def _question(requests: Sequence[Request]) -> Request:
    return next(request for request in requests if request.slice == OBSERVED_DOMAIN)


def _ask(side: Side, request: Request) -> str:
    """Asks the pruned model as any application would."""
    from openai import OpenAI

    assert request.body is not None
    client: Any = OpenAI(base_url=f"{side.endpoint.url}/v1", api_key="none")
    completion = client.chat.completions.create(
        model=side.endpoint.model,
        messages=request.body["messages"],
        max_tokens=96,
        temperature=0.0,
    )
    return str(completion.choices[0].message.content or "").strip()


def _table(comparison: Report) -> tuple[DomainRow, ...]:
    """One line a domain, from the report: its candidates are the three plans, in the order of the criteria."""
    return tuple(
        DomainRow(
            domain=domain,
            observed=domain == OBSERVED_DOMAIN,
            base=comparison.slices[domain].quality.perplexity_base,
            pruned={
                criterion: candidate.slices[domain].perplexity_candidate
                for criterion, candidate in zip(CRITERIA, comparison.candidates, strict=True)
            },
        )
        for domain in DOMAINS
    )


def _command(say: Callable[[str], None], *arguments: object) -> Mapping[str, JsonValue]:
    """Runs a command of this program in a process of its own and shows it."""
    words = [str(argument) for argument in arguments]
    say(f"    $ reap-serve {shlex.join(words)}")
    done = subprocess.run(
        [sys.executable, "-m", "reap_serve", *words, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")] or done.stderr.splitlines()
        raise EngineError(f"`reap-serve {words[0]}` stopped: {(lines or ['no message'])[-1]}", "run that command alone")
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value
