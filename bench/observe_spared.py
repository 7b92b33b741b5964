"""What it buys to spare a step the operators that it does not need (`reap_serve.adapter.stand_in`, `.tap_kernel`).

One compiled engine has an operator of Python in each layer's graph, and answers the same requests again and again: with
the operator in one turn, with a function that does nothing under its name in the next. Nothing is recorded.

    routing  the operator of the routers' hooks
    kernel   an operator behind each kernel, which there is not: a recorded step takes the kernel's name instead

Theory: an operator of Python takes some 8 microseconds a layer and step: 32 of the 1,300 of a step of the embedded
model's shape, 16 of the 50,000 of the large one's, which has two layers.

Run: python bench/observe_spared.py routing|kernel [--model embedded|large] [--turns N] [--engines N]
     Two to five minutes.

Output: one JSON document: operator, model, engines, turns (of each kind and engine), throughput_ratio and cpu_ratio
(spared / with the operator) with their 95 % intervals, engine_ratios (throughput, of each engine).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import observe_overhead as overhead

# So small that no step is sampled.
RECORDED = {"recorder": "deferred", "sample_fraction": 1e-9, "overhead_budget": None}


class KernelOperator:
    """In the place of `KernelTaps`: an operator behind each layer's kernel, in its graph."""

    def add(self, layer: Any) -> None:
        from reap_serve.adapter import tap

        plain = tap.plain_class(layer.routed_experts)

        def forward_modular(self: Any, x: Any, topk_weights: Any, topk_ids: Any, *others: Any, **named: Any) -> Any:
            output = plain.forward_modular(self, x, topk_weights, topk_ids, *others, **named)
            tap.show(self, x, topk_weights, topk_ids)
            return output

        layer.routed_experts.__class__ = type("Behind", (plain,), {"forward_modular": forward_modular})


def start(model: str, options: argparse.Namespace) -> tuple[overhead.Engine, Any]:
    """An engine that never spares an operator by itself, and what stands in for it."""
    import torch

    from reap_serve.adapter import loaded, wiring
    from reap_serve.adapter.stand_in import StandIn, routing_stand_in

    if options.operator == "routing":
        with mock.patch.object(loaded.LoadedEngine, "skipped_routing", None):
            return overhead.Engine(model, options, "sampled"), routing_stand_in()
    with mock.patch.object(wiring, "KernelTaps", KernelOperator):
        return overhead.Engine(model, options, "sampled"), StandIn(torch.ops.reap_serve, "tap")


def run_turn(engine: overhead.Engine, workload: overhead.Workload) -> overhead.Turn:
    """The requests through the engine."""
    engine.begin(workload)
    while not engine.done:
        engine.advance()
    return engine.turn


def compare(model: str, options: argparse.Namespace) -> dict[str, object]:
    workload = overhead.workload_of(options)
    engines: list[list[tuple[overhead.Turn, overhead.Turn]]] = []
    for _ in range(options.engines):
        engine, stand_in = start(model, options)
        for _ in range(2):
            run_turn(engine, workload)  # warm-up
        gc.collect()
        gc.freeze()
        pairs = []
        for number in range(options.turns):
            turns: dict[bool, overhead.Turn] = {}
            for spared in (number % 2 == 1, number % 2 == 0):
                if spared:
                    stand_in.enter()
                turns[spared] = run_turn(engine, workload)
                if spared:
                    stand_in.leave()
            pairs.append((turns[False], turns[True]))
        status = engine.status()
        assert (status["recorder"], status["complete"], status["failures"]) == ("read", True, 0), status
        engine.close()
        del engine
        gc.unfreeze()
        gc.collect()
        engines.append(pairs)
        ratio, (low, high) = overhead.ratio_of_sums(overhead.seconds_of(pairs))
        print(f"engine: {ratio:.4f}, {low:.4f} to {high:.4f}", file=sys.stderr, flush=True)
    everything = [pair for pairs in engines for pair in pairs]
    ratio, interval = overhead.ratio_of_sums(overhead.seconds_of(everything))
    cpu_T2 = np.array([(plain.cpu_seconds, spared.cpu_seconds) for plain, spared in everything])
    cpu_ratio, cpu_interval = overhead.ratio_of_sums(cpu_T2)
    return {
        "operator": options.operator,
        "model": options.model,
        "engines": options.engines,
        "turns": options.turns,
        "throughput_ratio": round(ratio, 4),
        "throughput_ratio_interval": overhead.rounded(interval),
        "cpu_ratio": round(cpu_ratio, 4),
        "cpu_ratio_interval": overhead.rounded(cpu_interval),
        "engine_ratios": [round(overhead.ratio_of_sums(overhead.seconds_of(each))[0], 4) for each in engines],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operator", choices=["routing", "kernel"])
    parser.add_argument("--model", choices=list(overhead.SHAPES), default="embedded")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--engines", type=int, default=2)
    options = parser.parse_args()
    options.turns = options.turns or (24 if options.model == "large" else 200)
    options.requests, options.workload, options.compiled, options.recompute = overhead.IN_FLIGHT, "serve", True, False
    overhead.OBSERVED["sampled"] = RECORDED
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    # Graphs with and without an operator are the same to the cache.
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # What vLLM prints does not belong to the document.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as directory:
        overhead.build(overhead.SHAPES[options.model], Path(directory))
        print(json.dumps(compare(directory, options)), file=answers)


if __name__ == "__main__":
    main()
