"""Throughput and inter-token latency of an observed engine against a plain one on the same requests, in turn.

Theory: vLLM's CPU kernel leaves the rows f_j(x) in memory, so that what recording adds is one reading of N*H*4 bytes
(N routes) beside 2*3*N*H*I flops: 0.06 of a layer's time at 1 TFLOP/s and 18 GB/s for I = 768, and a fixed tenth
of a millisecond a layer of operations on N numbers, which only small models notice. With --recompute nothing is read:
`inline` runs the fused kernel over K times as many rows, `deferred` copies the sampled inputs and runs the kernel over
them again, as other kernels need. The governor chooses the fraction of `deferred` such that its own time is at most its
budget, 2 % by default.

Run: python bench/observe_overhead.py [--model embedded|large|DIR] [--recorder inline|deferred|plain] [--compiled]
         [--recompute] [--turns N] [--requests N] [--pairs N]
     `embedded` is a random Qwen3-MoE of the shape of the model that ships with the project, `large` one with hidden
     2048, moe intermediate 768, 64 experts, top-8, 2 layers (2.6 GB of memory an engine). `inline` is measured on
     prefill, which is what `observe` runs; `deferred` on a server's mix, 16 requests in flight of 128 prompt and 48
     answer tokens. `plain` compares the plain engine with another plain one: what the method errs by.
     The plain and the observed engine live in one process. In a turn both run the same requests, some 30 ms of steps of
     the one and then of the other, each on a clock of its own: the speed of a machine that others use changes within a
     second, and so hits both alike. A pair of engines is replaced by a new one after N turns, since where its weights
     lie in memory makes one engine faster than another. The one that started second may be faster by a point: each kind
     does so in every other pair, so the number of pairs should be even. A governor begins at its smallest fraction
     and needs minutes to find its own: each engine that has one runs alone for a minute first. Two to nine minutes.

Output: one JSON document: model, recorder, workload, compiled, recorded_by, pairs, turns, tokens_per_second of plain
and observed, throughput_ratio (observed / plain, over all turns) with its 95 % interval, throughput_ratio_spread
(quartiles of the turns), pair_ratios (of each pair of engines), cpu_ratio (plain / observed CPU seconds) with its 95
% interval, itl_p99_ratio (observed / plain, of all intervals between a request's tokens; deferred and plain only)
with its 95 % interval, sample_fraction (at the end). Wanted: inline throughput_ratio >= 0.88; deferred
throughput_ratio >= 0.98, itl_p99_ratio <= 1.05.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from timed_engine import IN_FLIGHT, Engine, Turn, Workload, document_of, make_workload, ratio_of_sums, rounded

RESAMPLES = 500
SETTLE_SECONDS = 60.0
OBSERVED: dict[str, dict[str, Any]] = {
    "inline": {"recorder": "inline"},
    "deferred": {"recorder": "deferred", "overhead_budget": 0.02},
}


def start(model: str, options: argparse.Namespace, kind: str) -> Engine:
    settings = OBSERVED.get(kind)
    if settings is not None:
        settings = {**settings, "read_kernel_rows": not options.recompute}
    return Engine(model, options.compiled, settings)


def settle(engine: Engine, workload: Workload) -> None:
    """Lets a governor find its fraction."""
    started = time.perf_counter()
    while time.perf_counter() - started < SETTLE_SECONDS:
        engine.begin(workload)
        while not engine.done:
            engine.advance()


def run_turn(pair: tuple[Engine, Engine], workload: Workload) -> tuple[Turn, Turn]:
    """The same requests through both engines, block by block."""
    for engine in pair:
        engine.begin(workload)
    order = pair
    while not all(engine.done for engine in pair):
        for engine in order:
            engine.advance()
        order = (order[1], order[0])
    return pair[0].turn, pair[1].turn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--recorder", choices=["plain", *OBSERVED], default="inline")
    parser.add_argument("--workload", choices=["prefill", "serve"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--pairs", type=int)
    options = parser.parse_args()
    options.workload = options.workload or ("prefill" if options.recorder == "inline" else "serve")
    large, prefill = options.model == "large", options.workload == "prefill"
    options.turns = options.turns or (12 if large else 40)
    options.requests = options.requests or (64 if prefill and not large else IN_FLIGHT)
    options.pairs = options.pairs or (2 if large else 6)
    document_of(options.model, lambda model: json.dumps(compare(model, options)))


def compare(model: str, options: argparse.Namespace) -> dict[str, object]:
    prefill = options.workload == "prefill"
    block_steps = 1 if prefill or options.model == "large" else 4
    workload = make_workload(options.requests, prefill=prefill, block_steps=block_steps)
    turns: list[list[tuple[Turn, Turn]]] = []
    facts: dict[str, Any] = {"recorded_by": None, "sample_fraction": None}
    for number in range(options.pairs):
        # Neither kind is always the one that was started first.
        kinds = ("plain", options.recorder)
        started = [start(model, options, kind) for kind in kinds[:: 1 if number % 2 == 0 else -1]]
        pair = (started[0], started[1]) if number % 2 == 0 else (started[1], started[0])
        for _ in range(2):
            run_turn(pair, workload)  # warm-up
        # As in vLLM's server: no collection of garbage goes through what an engine is made of.
        gc.collect()
        gc.freeze()
        if "overhead_budget" in OBSERVED.get(options.recorder, {}):
            settle(pair[1], workload)
        turns.append([run_turn(pair, workload) for _ in range(options.turns)])
        ratio, (low, high) = ratio_of_sums(seconds_of(turns[-1]))
        print(f"pair {number}: {ratio:.4f}, {low:.4f} to {high:.4f}", file=sys.stderr, flush=True)
        if options.recorder in OBSERVED:
            status = pair[1].status()
            facts = {"recorded_by": status["recorder"], "sample_fraction": status["sample_fraction"]}
        for engine in pair:
            engine.close()
        del pair, started, engine
        gc.unfreeze()
        gc.collect()
    return {
        "model": options.model,
        "recorder": options.recorder,
        "workload": options.workload,
        "compiled": options.compiled,
        "pairs": options.pairs,
        "turns": options.turns,
        **facts,
        **figures([turn for pair_turns in turns for turn in pair_turns], workload),
        "pair_ratios": [round(ratio_of_sums(seconds_of(pair_turns))[0], 4) for pair_turns in turns],
    }


def figures(turns: list[tuple[Turn, Turn]], workload: Workload) -> dict[str, object]:
    seconds_T2 = seconds_of(turns)
    ratio, interval = ratio_of_sums(seconds_T2)
    tokens = len(turns) * sum(len(prompt) + workload.answer_tokens for prompt in workload.prompts)
    plain_seconds, observed_seconds = seconds_T2.sum(axis=0).tolist()
    cpu_ratio, cpu_interval = ratio_of_sums(
        np.array([(plain.cpu_seconds, observed.cpu_seconds) for plain, observed in turns])
    )
    found: dict[str, object] = {
        "plain_tokens_per_second": round(tokens / plain_seconds, 1),
        "observed_tokens_per_second": round(tokens / observed_seconds, 1),
        "throughput_ratio": round(ratio, 4),
        "throughput_ratio_interval": rounded(interval),
        "throughput_ratio_spread": rounded(np.quantile(seconds_T2[:, 0] / seconds_T2[:, 1], (0.25, 0.75)).tolist()),
        "cpu_ratio": round(cpu_ratio, 4),
        "cpu_ratio_interval": rounded(cpu_interval),
    }
    if turns[0][0].intervals:
        plain_TI = np.array([plain.intervals for plain, _ in turns])
        observed_TI = np.array([observed.intervals for _, observed in turns])
        found["itl_p99_ratio"] = round(p99_ratio(plain_TI, observed_TI), 4)
        random = np.random.default_rng(0)
        drawn = [random.integers(len(turns), size=len(turns)) for _ in range(RESAMPLES)]
        resampled = [p99_ratio(plain_TI[turn], observed_TI[turn]) for turn in drawn]
        found["itl_p99_ratio_interval"] = rounded(np.quantile(resampled, (0.025, 0.975)).tolist())
    return found


def seconds_of(turns: list[tuple[Turn, Turn]]) -> npt.NDArray[np.float64]:
    return np.array([(plain.seconds, observed.seconds) for plain, observed in turns])


def p99_ratio(plain: npt.NDArray[np.float64], observed: npt.NDArray[np.float64]) -> float:
    return float(np.quantile(observed, 0.99) / np.quantile(plain, 0.99))


if __name__ == "__main__":
    main()
