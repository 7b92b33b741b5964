"""What it buys to spare a step the operators that it does not need (`reap_serve.adapter.stand_in`, `.tap_kernel`).

One compiled engine has an operator of Python in each layer's graph, and answers the same requests over and over. A few
steps run with the operator, the next with a function that does nothing under its name, and in the turn after it the
other way round. Nothing is recorded.

    routing  the operator of the routers' hooks
    kernel   an operator behind each kernel, which there is not: a recorded step takes the kernel's name instead

Theory: an operator of Python takes some ten microseconds a layer and step. A step of the embedded model's shape has
four layers and takes a few milliseconds; one of the large one's has two, and takes tens of milliseconds.

Run: python bench/observe_spared.py routing|kernel [--model embedded|large] [--turns N] [--engines N]
     Two to five minutes.

Output: one JSON document: operator, model, engines, turns (of each engine), throughput_ratio and cpu_ratio (spared /
with the operator) with their 95 % intervals, engine_ratios (throughput, of each engine).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from timed_engine import IN_FLIGHT, SHAPES, Engine, Workload, document_of, make_workload, ratio_of_sums, rounded

Seconds = npt.NDArray[np.float64]

# So small that no step is sampled.
RECORDED: dict[str, object] = {"recorder": "deferred", "sample_fraction": 1e-9, "overhead_budget": None}


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


def start(model: str, options: argparse.Namespace) -> tuple[Engine, Any]:
    """An engine that never spares an operator by itself, and what stands in for it."""
    import torch

    from reap_serve.adapter import loaded, wiring
    from reap_serve.adapter.stand_in import StandIn, routing_stand_in

    if options.operator == "routing":
        with mock.patch.object(loaded.LoadedEngine, "skipped_routing", None):
            return Engine(model, True, RECORDED), routing_stand_in()
    with mock.patch.object(wiring, "KernelTaps", KernelOperator):
        return Engine(model, True, RECORDED), StandIn(torch.ops.reap_serve, "tap")


def run_turn(engine: Engine, workload: Workload, stand_in: Any, first: bool) -> Seconds:
    """The requests through the engine, block by block.

    Args:
        engine: The engine.
        workload: The requests.
        stand_in: What spares the operator.
        first: Whether the first block is spared it.

    Returns:
        By kind (with the operator, spared it) its seconds and CPU seconds.
    """
    seconds = np.zeros((2, 2))
    engine.begin(workload)
    turn, spared = engine.turn, first
    while not engine.done:
        before = turn.seconds, turn.cpu_seconds
        if spared:
            stand_in.enter()
        engine.advance()
        if spared:
            stand_in.leave()
        seconds[int(spared)] += turn.seconds - before[0], turn.cpu_seconds - before[1]
        spared = not spared
    return seconds


def compare(model: str, options: argparse.Namespace) -> dict[str, object]:
    workload = make_workload(IN_FLIGHT, prefill=False, block_steps=1 if options.model == "large" else 4)
    # Of each pair of turns, in which every block runs both ways.
    engines: list[Seconds] = []
    for _ in range(options.engines):
        engine, stand_in = start(model, options)
        for _ in range(2):
            run_turn(engine, workload, stand_in, first=False)  # warm-up
        gc.collect()
        gc.freeze()
        pairs = [
            run_turn(engine, workload, stand_in, first=False) + run_turn(engine, workload, stand_in, first=True)
            for _ in range(options.turns // 2)
        ]
        status = engine.status()
        assert (status["recorder"], status["complete"], status["failures"]) == ("read", True, 0), status
        engine.close()
        del engine
        gc.unfreeze()
        gc.collect()
        engines.append(np.array(pairs))
        ratio, (low, high) = ratio_of_sums(engines[-1][:, :, 0])
        print(f"engine: {ratio:.4f}, {low:.4f} to {high:.4f}", file=sys.stderr, flush=True)
    everything = np.concatenate(engines)
    ratio, interval = ratio_of_sums(everything[:, :, 0])
    cpu_ratio, cpu_interval = ratio_of_sums(everything[:, :, 1])
    return {
        "operator": options.operator,
        "model": options.model,
        "engines": options.engines,
        "turns": options.turns,
        "throughput_ratio": round(ratio, 4),
        "throughput_ratio_interval": rounded(interval),
        "cpu_ratio": round(cpu_ratio, 4),
        "cpu_ratio_interval": rounded(cpu_interval),
        "engine_ratios": [round(ratio_of_sums(each[:, :, 0])[0], 4) for each in engines],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operator", choices=["routing", "kernel"])
    parser.add_argument("--model", choices=list(SHAPES), default="embedded")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--engines", type=int, default=2)
    options = parser.parse_args()
    options.turns = options.turns or (24 if options.model == "large" else 300)
    # Graphs with and without an operator are the same to the cache.
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    document_of(options.model, lambda model: json.dumps(compare(model, options)))


if __name__ == "__main__":
    main()
