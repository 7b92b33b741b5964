"""Makes the table: methods x sparsity x calibration on the embedded model.

Run: ``python -m bench.paper``. Every figure goes to ``build/paper/results.jsonl`` as it is made; a run that was stopped
goes on from there. ``bench/paper/results.json`` and ``bench/paper/TABLE.md`` are written from those that are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.paper.candidates import CANDIDATES, Candidates
from bench.paper.collect import collect
from bench.paper.measure import HeldOut
from bench.paper.methods import METHODS, changed_layers
from bench.paper.network import Network
from bench.paper.report import write_report
from bench.paper.traffic import MIXTURE, calibration_samples, read_sequences

SEED = 20261122
NUM_SAMPLES, REQUESTS_PER_SAMPLE = 3, 40
# Requests of the held-out traffic by domain: text has many tokens, structured answers are scored by the request.
HELD_OUT = {"code": 14, "prose": 14, "german": 14, "tools": 50, "arithmetic": 50}
TOLERANCE = 1e-3
SPARSITIES = (0.25, 0.5)
# The key of the unchanged model's figures: no calibration, nothing gone.
BASE = ("base", "", 0, 0.0)


@dataclass(frozen=True, slots=True)
class Task:
    """One calibration sample, on which every method works."""

    source: str
    sample: int


def main() -> None:
    """Runs what is missing and, when nothing is, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefacts", type=Path, default=Path("reap_serve/demo/tiny_moe"))
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--output", type=Path, default=Path("bench/paper"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3600.0, help="Stop after; run again to go on.")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = arguments.work / "results.jsonl"
    deadline = time.time() + arguments.seconds
    _require_same_as_transformers(arguments.artefacts)
    sources = (MIXTURE, "tools", "arithmetic", "code", "prose", "german")
    # By sample, but the mixture first: its candidates are shared out over the processes.
    tasks = [Task(source, sample) for sample in range(NUM_SAMPLES) for source in sources]
    tasks.sort(key=lambda task: task.source != MIXTURE)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=_work, args=(arguments.artefacts, results, tasks[number :: arguments.processes], deadline)
        )
        for number in range(arguments.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done = {_key(line) for line in _lines(results)}
    wanted = {key for task in tasks for key in _wanted(task)}
    if wanted - done:
        print(f"{len(wanted & done)} of {len(wanted)} figures are there; run again to go on")
    lines = [line for line in _lines(results) if _key(line) in wanted | {BASE}]
    write_report(lines, arguments.output, seed=SEED, held_out=HELD_OUT, requests=REQUESTS_PER_SAMPLE)


def _require_same_as_transformers(artefacts: Path) -> None:
    """Stops where the network here and transformers' differ on a held-out request."""
    from transformers import Qwen3MoeForCausalLM

    reference = Qwen3MoeForCausalLM.from_pretrained(artefacts / "model", dtype=torch.float32).eval()
    network = Network(artefacts / "model")
    tokens_BT = torch.tensor([read_sequences(artefacts, "heldout")["code"][0].token_ids])
    with torch.no_grad():
        wanted = reference(tokens_BT).logits[0]
        found = network.logits(network.hidden(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), network.layers))
    difference = float((wanted - found).abs().max())
    if difference > TOLERANCE:
        raise SystemExit(f"logits differ from those of transformers by {difference:.2g}")


def _work(artefacts: Path, results: Path, tasks: list[Task], deadline: float) -> None:
    torch.set_num_threads(1)
    network = Network(artefacts / "model")
    held = read_sequences(artefacts, "heldout")
    held_out = HeldOut(network, [each for domain, count in HELD_OUT.items() for each in held[domain][:count]])
    samples = calibration_samples(read_sequences(artefacts, "calibration"), NUM_SAMPLES, REQUESTS_PER_SAMPLE, SEED)
    done = {_key(line) for line in _lines(results)}
    if BASE not in done and Task("mixture", 0) in tasks:
        _add(results, {"method": "base", "source": "", "sample": 0, "sparsity": 0.0}, held_out.measure(network.layers))
    # What a stopped run has is of use: the published methods first.
    order = itertools.chain(((task, METHODS) for task in tasks), ((task, CANDIDATES) for task in tasks))
    for task, methods in order:
        missing = [key for key in _wanted(task) if key[0] in methods and key not in done]
        if not missing:
            continue
        collected = collect(network, samples[task.source, task.sample])
        candidates = Candidates(network, collected, samples[task.source, task.sample])
        for method, source, sample, sparsity in missing:
            if time.time() > deadline:
                return
            keep = round(network.num_experts * (1 - sparsity))
            started = time.time()
            if method in CANDIDATES:
                layers = candidates.layers(method, keep)
            else:
                layers = changed_layers(network, method, collected.statistics, keep, seed=SEED + sample)
            spent = time.time() - started
            entry = {"method": method, "source": source, "sample": sample, "sparsity": sparsity}
            _add(results, entry | {"seconds": round(spent, 2)}, held_out.measure(layers))


def _wanted(task: Task) -> Iterator[tuple[str, str, int, float]]:
    for sparsity in SPARSITIES:
        for method in (*METHODS, *CANDIDATES):
            # Random choice looks at no traffic.
            if method != "random" or task.source == "mixture":
                yield method, task.source, task.sample, sparsity


def _lines(results: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _key(line: dict[str, object]) -> tuple[object, ...]:
    return line["method"], line["source"], line["sample"], line["sparsity"]


def _add(results: Path, entry: dict[str, object], figures: dict[str, object]) -> None:
    line = entry | {"domains": {domain: asdict(each) for domain, each in figures.items()}}  # type: ignore[call-overload]
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
