"""`tune`'s choice against REAP at equal size: mixtures with trials, single domains by criteria; in vLLM, measured here.

Run: ``python -m bench.paper.tuned [--artefacts DIR] [--name NAME]``. Figures go to ``build/paper/tuned-NAME.jsonl`` as
they are made; a run that was stopped goes on from there. ``python -m bench.paper.tuned_report`` writes TUNED.md.

A calibration sample is parted as `tune` parts traffic: four fifths are observed and tried under masks, a fifth chooses.
REAP is calibrated on the whole sample. Both are measured on held-out traffic by `measure.py`, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bench.paper.measure import HeldOut
from bench.paper.network import Network
from bench.paper.run import HELD_OUT, SEED
from bench.paper.traffic import MIXTURE, read_sequences
from bench.tiny_moe.conversations import DOMAINS
from reap_serve.architectures.resolve import resolve
from reap_serve.model import ModelSource, open_model
from reap_serve.plan.limits import ServingTarget
from reap_serve.plan.model_limits import limits_of_source
from reap_serve.plan.request import Size
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.request import Request
from reap_serve.tune.engine import Case, TuneEngine, open_engine
from reap_serve.tune.ledger import Ledger
from reap_serve.tune.measuring import Measuring, PartCases, figures
from reap_serve.tune.request import Budget
from reap_serve.tune.rules import Candidate, Rule, candidate, criteria_rules
from reap_serve.tune.spending import Spending
from reap_serve.tune.trials import run_trials

MIXTURE_SAMPLES, REQUESTS_PER_DOMAIN = 6, 13
DOMAIN_SAMPLES, REQUESTS_OF_ONE_DOMAIN = 3, 40
CHOOSING = 0.2
ENGINE = {"max_model_len": 1024, "max_num_seqs": 128}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is calibrated on, how much goes, and whether trials are made."""

    source: str
    sample: int
    sparsity: float


def settings() -> Iterator[Setting]:
    """In the order of their worth: a run that is stopped early has the main ones."""
    for sparsity in (0.5, 0.25):
        for sample in range(MIXTURE_SAMPLES):
            yield Setting(MIXTURE, sample, sparsity)
        for sample in range(DOMAIN_SAMPLES):
            for domain in DOMAINS:
                yield Setting(domain, sample, sparsity)


def main() -> None:
    """Measures what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefacts", type=Path, default=Path("reap_serve/demo/tiny_moe"))
    parser.add_argument("--name", default="top-2-of-32")
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--seconds", type=float, default=7200.0, help="Stop after; run again to go on.")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = arguments.work / f"tuned-{arguments.name}.jsonl"
    done = {tuple(line["setting"].values()) for line in _lines(results)}
    missing = [each for each in settings() if tuple(asdict(each).values()) not in done]
    deadline = time.time() + arguments.seconds
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    source = open_model(str(arguments.artefacts / "model"))
    if missing:
        network = Network(arguments.artefacts / "model")
        held = read_sequences(arguments.artefacts, "heldout")
        held_out = HeldOut(network, [each for domain, count in HELD_OUT.items() for each in held[domain][:count]])
        layers = resolve(source.config).limits(source.config).moe_layers
        with open_engine(source, layers, ENGINE) as engine:
            for setting in missing:
                if time.time() > deadline:
                    break
                line = _measure(setting, arguments.artefacts, source, engine, network, held_out)
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def _measure(
    setting: Setting,
    artefacts: Path,
    source: ModelSource,
    engine: TuneEngine,
    network: Network,
    held_out: HeldOut,
) -> dict[str, object]:
    started, masked = time.time(), engine.masked_tokens
    observed, choosing = _sample(engine, artefacts, setting)
    keep = round(network.num_experts * (1 - setting.sparsity))
    model, target, size = limits_of_source(source), ServingTarget(), Size(keep_experts=keep)
    whole = criteria_rules(engine.observe([*observed, *choosing]), model, target, size)
    rules = criteria_rules(engine.observe(observed), model, target, size)
    kept: dict[str, Candidate] = {rule.name: candidate(rule, keep) for rule in whole}
    with tempfile.TemporaryDirectory() as folder:
        ledger, spending = Ledger(Path(folder) / "out", "bench"), Spending(Budget(), 0.0, engine=engine)
        trials: Sequence[Rule] = ()
        if setting.source == MIXTURE:
            prior = next(rule for rule in reversed(rules) if rule.criterion == "asq")
            rounds = run_trials(engine, observed, prior, keep, SEED + setting.sample, ledger, spending)
            trials = [each.rule for each in rounds]
        measuring = Measuring(engine, {"selection": PartCases(choosing, ())}, 1, ledger, spending)
        tried = [candidate(rule, keep) for rule in (*rules, *trials)]
        divergences = [
            figures(slices, ()).kl_divergence_mean
            for slices in measuring.measure([each.mask for each in tried], "selection")
        ]
    kept |= {each.rule.name: each for each in tried if each.rule.criterion == "trials"}
    chosen = tried[int(np.argmin(divergences))]
    # What was chosen among the criteria is planned on the whole sample, as REAP is.
    kept["tune"] = kept.get(chosen.rule.name, chosen)
    return {
        "setting": asdict(setting),
        "chosen": chosen.rule.name,
        "selection": {each.rule.name: round(value, 5) for each, value in zip(tried, divergences, strict=True)},
        "kl": {name: _held_out(network, held_out, each, setting.source) for name, each in kept.items()},
        "masked_tokens": engine.masked_tokens - masked,
        "seconds": round(time.time() - started, 1),
    }


def _held_out(network: Network, held_out: HeldOut, found: Candidate, source: str) -> float:
    layers = [
        layer.keep(np.flatnonzero(kept_E).tolist())
        for layer, kept_E in zip(network.layers, found.decision.kept_LE, strict=True)
    ]
    domains = held_out.measure(layers)
    some = domains.values() if source == MIXTURE else [domains[source]]
    return round(float(np.mean([each.kl for each in some])), 6)


def _sample(engine: TuneEngine, artefacts: Path, setting: Setting) -> tuple[list[Case], list[Case]]:
    """The requests of a sample, those of one source disjoint: observed ones and those that choose."""
    observed: list[Case] = []
    choosing: list[Case] = []
    count = REQUESTS_PER_DOMAIN if setting.source == MIXTURE else REQUESTS_OF_ONE_DOMAIN
    for number, domain in enumerate(DOMAINS if setting.source == MIXTURE else (setting.source,)):
        requests: list[Request] = list(read_traffic([str(artefacts / "traffic" / f"{domain}.calibration.jsonl")]))
        order = np.random.default_rng([SEED, number]).permutation(len(requests))
        part = [requests[index] for index in order[setting.sample * count : (setting.sample + 1) * count]]
        cases = engine.cases(part)
        few = max(1, round(CHOOSING * len(cases)))
        choosing += cases[:few]
        observed += cases[few:]
    return observed, choosing


def _lines(results: Path) -> list[dict[str, dict[str, object]]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
