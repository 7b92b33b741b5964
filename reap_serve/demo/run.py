"""The loop on the embedded model: observe one domain, plan, try plans as masks, prune, verify, serve by stock vLLM.

The steps up to `verify` are the very commands that a user would run. Three plans of the same size are tried as masks in
one engine: `reap`, `frequency` (the most used experts) and `random`. That of `reap` becomes a checkpoint, which stock
vLLM serves.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from reap_serve.compare.assemble import Candidate, report
from reap_serve.compare.measure import Cases, CompareSettings, Measured, measure, prepare
from reap_serve.compare.record import Report
from reap_serve.compare.side import Side, experts_of, open_side
from reap_serve.compare.write import fill_directory
from reap_serve.engine_environment import CPU_KV_CACHE_VARIABLE
from reap_serve.errors import EngineError, InputFileError
from reap_serve.plan.record import Plan, read_plan
from reap_serve.record.settings import BASE_PLAN
from reap_serve.records import JsonValue, Record
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.request import Request

DOMAINS = ("code", "prose", "german", "tools", "arithmetic")
OBSERVED_DOMAIN = "code"
CRITERIA = ("reap", "frequency", "random")
KEEP_FRACTION = 0.5
KEPT = 16
REQUESTS_PER_DOMAIN = 24
SERVER_ARGUMENTS = (
    *("--enforce-eager", "--max-model-len", "1024"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
SETTINGS = CompareSettings(
    server_arguments=SERVER_ARGUMENTS, max_answer_tokens=48, answers_per_slice=4, latency_requests=12
)


class DomainRow(Record):
    """Held-out perplexity of one domain.

    Attributes:
        domain: Its name.
        observed: Whether the plans were made from this domain's traffic.
        base: Of the whole model.
        masked: Of the whole model under each plan as a mask, by criterion.
        served: Of the pruned checkpoint of `reap`, served by stock vLLM.
    """

    domain: str
    observed: bool
    base: float
    masked: dict[str, float]
    served: float


class DemoResult(Record):
    """What the demo made.

    Attributes:
        artifacts: Paths by name.
        table: One row a domain.
        question: What the pruned model was asked through the openai client.
        answer: What it answered.
        compare: The report on `reap` against the base.
        seconds: Wall time.
    """

    artifacts: dict[str, str]
    table: tuple[DomainRow, ...]
    question: str
    answer: str
    compare: Report
    seconds: float

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
    started = time.monotonic()
    files = demo_files()
    # The machine may be small and the model is: one GiB of KV cache is plenty.
    os.environ.setdefault(CPU_KV_CACHE_VARIABLE, "1")
    stats = output / f"{OBSERVED_DOMAIN}.stats.safetensors"
    say(f"1/5 observe: the {OBSERVED_DOMAIN} traffic runs through vLLM, every expert's gate and output norm is summed")
    _command(say, "observe", files.model, files.calibration(OBSERVED_DOMAIN), "--output", stats)
    say("2/5 plan: half of the experts of every layer stay, chosen by three criteria")
    plans = {criterion: output / f"{criterion}.plan.json" for criterion in CRITERIA}
    for criterion, path in plans.items():
        _command(say, "plan", stats, "--keep-fraction", KEEP_FRACTION, "--criterion", criterion, "--output", path)
    say("3/5 try: the plans as masks in one engine, on held-out requests of all domains; nothing is pruned yet")
    requests = _requests(files)
    with open_side(str(files.model), SERVER_ARGUMENTS, masks=True) as side:
        full = side.under(BASE_PLAN)
        cases = prepare(full, requests, SETTINGS)
        base = measure(full, cases, SETTINGS, lambda: None, again=True)
        masked = {criterion: _under_mask(side, read_plan(path), criterion, cases) for criterion, path in plans.items()}
    say(f"    {side.memory.start_seconds:.0f} s to start, {len(cases.forced)} requests scored under each")
    say("4/5 prune and verify: the plan of reap becomes a checkpoint, held against every byte that it was made from")
    pruned = output / "model-reap"
    _command(say, "prune", files.model, plans["reap"], pruned)
    _command(say, "verify", pruned, "--source", files.model, "--plan", plans["reap"])
    say("5/5 serve and compare: the pruned checkpoint by stock vLLM, no plugin loaded")
    question = _question(requests)
    with open_side(str(pruned), SERVER_ARGUMENTS) as side:
        answer = _ask(side, question)
        served = measure(side, cases, SETTINGS, lambda: None)
    candidates = [Candidate(pruned.name, False, experts_of(str(pruned)), served.memory.weights_bytes, served)]
    candidates += [Candidate(f"{criterion} (mask)", True, KEPT, None, found) for criterion, found in masked.items()]
    comparison = report("the embedded model", pruned.name, cases, base, served, SETTINGS, candidates)
    written = fill_directory(comparison, output, plan=read_plan(plans["reap"]))
    say(f"    report: {written[-1]}")
    artifacts = {
        "model": str(files.model),
        "stats": str(stats),
        **{f"plan_{criterion}": str(plans[criterion]) for criterion in CRITERIA},
        "model_reap": str(pruned),
        **{"report" if path.suffix == ".json" else "report_html": str(path) for path in written},
    }
    return DemoResult(
        artifacts=artifacts,
        table=_table(comparison),
        question=str(question.body["messages"][-1]["content"]),  # type: ignore[index,call-overload]
        answer=answer,
        compare=comparison,
        seconds=time.monotonic() - started,
    )


def _under_mask(side: Side, plan: Plan, name: str, cases: Cases) -> Measured:
    """What the whole model says under a plan, as its pruned checkpoint would."""
    side.endpoint.load_plan(name, plan)
    try:
        return measure(side.under(name), cases.without_load(), SETTINGS.without_load(), lambda: None)
    finally:
        side.endpoint.forget_plan(name)


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
    """One line a domain, from the report: its candidates are the checkpoint and the masks, in the criteria's order."""
    masks = dict(zip(CRITERIA, comparison.candidates[1:], strict=True))
    return tuple(
        DomainRow(
            domain=domain,
            observed=domain == OBSERVED_DOMAIN,
            base=comparison.slices[domain].quality.perplexity_base,
            masked={name: found.slices[domain].perplexity_candidate for name, found in masks.items()},
            served=comparison.slices[domain].quality.perplexity_candidate,
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
