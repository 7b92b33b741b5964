"""`tune`'s choice against REAP at equal size: mixtures with trials, single domains by criteria; in vLLM, measured here.

Run: ``python -m bench.paper.tuned [--artefacts DIR] [--name NAME] [--samples N]``. Figures go to
``build/paper/tuned-NAME.jsonl`` as they are made; a run that was stopped goes on from there. ``python -m
bench.paper.tuned_report`` writes TUNED.md.

A calibration sample is parted as `tune` parts what is not held out: of seven requests five are observed and tried under
masks, two choose, by `tune`'s own search and guard. REAP is calibrated on the whole sample. Both are measured on
held-out traffic by `measure.py`, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
from reap_serve.statistics.record import Statistics
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.request import Request
from reap_serve.tune.engine import Case, TuneEngine, open_engine
from reap_serve.tune.ledger import Ledger
from reap_serve.tune.measuring import Measuring, PartCases
from reap_serve.tune.request import Budget
from reap_serve.tune.rules import TRIALS, Candidate, Rule, candidate, criteria_rules
from reap_serve.tune.search import Search
from reap_serve.tune.spending import Spending
from reap_serve.tune.trials import run_trials

MIXTURE_SAMPLES, REQUESTS_PER_DOMAIN = 6, 13
# Three samples that share no request, and three more of another order.
DOMAIN_SAMPLES, REQUESTS_OF_ONE_DOMAIN, SAMPLES_OF_AN_ORDER = 6, 40, 3
CHOOSING = 2 / 7
SPARSITIES = (0.5, 0.25)
ENGINE = {"max_model_len": 1024, "max_num_seqs": 128}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is calibrated on, how much goes, and whether trials are made."""

    source: str
    sample: int
    sparsity: float


def settings() -> Iterator[Setting]:
    """In the order in which they are measured: the cheap ones first."""
    for sample in range(DOMAIN_SAMPLES):
        for domain in DOMAINS:
            for sparsity in SPARSITIES:
                yield Setting(domain, sample, sparsity)
    for sparsity in SPARSITIES:
        for sample in range(MIXTURE_SAMPLES):
            yield Setting(MIXTURE, sample, sparsity)


@dataclass(frozen=True, slots=True)
class Sample:
    """The requests of a sample, and the statistics of all of them and of those that are observed."""

    observed: list[Case]
    choosing: list[Case]
    of_all: Statistics
    of_observed: Statistics


def main() -> None:
    """Measures what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefacts", type=Path, default=Path("reap_serve/demo/tiny_moe"))
    parser.add_argument("--name", default="top-2-of-32")
    parser.add_argument("--samples", type=int, default=MIXTURE_SAMPLES, help="Of each source, at most.")
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--seconds", type=float, default=7200.0, help="Stop after; run again to go on.")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = arguments.work / f"tuned-{arguments.name}.jsonl"
    done = {tuple(line["setting"].values()) for line in _lines(results)}
    asked = (each for each in settings() if each.sample < arguments.samples)
    missing = [each for each in asked if tuple(asdict(each).values()) not in done]
    deadline = time.time() + arguments.seconds
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    source = open_model(str(arguments.artefacts / "model"))
    if missing:
        network = Network(arguments.artefacts / "model")
        held = read_sequences(arguments.artefacts, "heldout")
        held_out = {domain: HeldOut(network, held[domain][:count]) for domain, count in HELD_OUT.items()}
        samples: dict[tuple[str, int], Sample] = {}
        layers = resolve(source.config).limits(source.config).moe_layers
        with open_engine(source, layers, ENGINE) as engine:
            for setting in missing:
                if time.time() > deadline:
                    break
                key = setting.source, setting.sample
                if key not in samples:
                    samples = {key: _sample(engine, arguments.artefacts, setting)}
                line = _measure(setting, samples[key], source, engine, network, held_out)
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def _measure(
    setting: Setting,
    sample: Sample,
    source: ModelSource,
    engine: TuneEngine,
    network: Network,
    held_out: Mapping[str, HeldOut],
) -> dict[str, object]:
    started, masked = time.time(), engine.masked_tokens
    keep = round(network.num_experts * (1 - setting.sparsity))
    model, target, size = limits_of_source(source), ServingTarget(), Size(keep_experts=keep)
    whole = criteria_rules(sample.of_all, model, target, size)
    rules = criteria_rules(sample.of_observed, model, target, size)
    kept: dict[str, Candidate] = {rule.name: candidate(rule, keep) for rule in whole}
    with tempfile.TemporaryDirectory() as folder:
        ledger, spending = Ledger(Path(folder) / "out", "bench"), Spending(Budget(), 0.0, engine=engine)
        trials: Sequence[Rule] = ()
        if setting.source == MIXTURE:
            prior = next(rule for rule in reversed(rules) if rule.criterion == "asq")
            rounds = run_trials(engine, sample.observed, prior, keep, SEED + setting.sample, ledger, spending)
            trials = [each.rule for each in rounds]
        measuring = Measuring(engine, {"selection": PartCases(sample.choosing, ())}, 1, ledger, spending)
        search = Search(measuring, (), spending, (keep,), 0, lambda line: None)
        ranked = search.at_size((*rules, *trials), keep)
        sums = {each.candidate.rule.name: measuring.by_request(each.candidate.mask, "selection") for each in ranked}
    by_trials = (each.candidate for each in ranked if each.candidate.rule.criterion == TRIALS)
    kept |= {each.rule.name: each for each in sorted(by_trials, key=lambda each: each.rule.name)}
    # What was chosen among the criteria is planned on the whole sample, as REAP is.
    chosen = ranked[0].candidate.rule.name
    divergence = {name: _held_out(network, held_out, each, setting.source) for name, each in kept.items()}
    return {
        "setting": asdict(setting),
        "chosen": chosen,
        "selection": {each.candidate.rule.name: round(each.figures.kl_divergence_mean, 5) for each in ranked},
        "over_reap": {
            each.candidate.rule.name: each.over_reap.model_dump() for each in ranked if each.over_reap is not None
        },
        "kl": divergence | {"tune": divergence[chosen]},
        "requests": {
            rule: {name: [each.divergence_C.tolist(), each.tokens_C.tolist()] for name, each in by_slice.items()}
            for rule, by_slice in sums.items()
        },
        "masked_tokens": engine.masked_tokens - masked,
        "seconds": round(time.time() - started, 1),
    }


def _held_out(network: Network, held_out: Mapping[str, HeldOut], found: Candidate, source: str) -> float:
    layers = [
        layer.keep(np.flatnonzero(kept_E).tolist())
        for layer, kept_E in zip(network.layers, found.decision.kept_LE, strict=True)
    ]
    domains = DOMAINS if source == MIXTURE else (source,)
    return round(float(np.mean([held_out[domain].measure(layers)[domain].kl for domain in domains])), 6)


def _sample(engine: TuneEngine, artefacts: Path, setting: Setting) -> Sample:
    """Draws a sample and observes it; samples of one source and order share no request."""
    order_number, place = divmod(setting.sample, MIXTURE_SAMPLES if setting.source == MIXTURE else SAMPLES_OF_AN_ORDER)
    observed: list[Case] = []
    choosing: list[Case] = []
    count = REQUESTS_PER_DOMAIN if setting.source == MIXTURE else REQUESTS_OF_ONE_DOMAIN
    for number, domain in enumerate(DOMAINS if setting.source == MIXTURE else (setting.source,)):
        requests: list[Request] = list(read_traffic([str(artefacts / "traffic" / f"{domain}.calibration.jsonl")]))
        seed = [SEED, number, order_number] if order_number else [SEED, number]
        order = np.random.default_rng(seed).permutation(len(requests))
        part = [requests[index] for index in order[place * count : (place + 1) * count]]
        cases = engine.cases(part)
        few = max(1, round(CHOOSING * len(cases)))
        choosing += cases[:few]
        observed += cases[few:]
    return Sample(observed, choosing, engine.observe([*observed, *choosing]), engine.observe(observed))


def _lines(results: Path) -> list[dict[str, dict[str, object]]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
