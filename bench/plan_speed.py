"""How long a plan takes at the size of the largest open models: 61 layers, 384 experts, 20 slices.

Theory. A plan reads S * L * E sums a few times and sorts L rows of E numbers: 470,000 sums and 61 sorts, milliseconds.
max-min sorts the rows once a step, at most 40 times, and tries swaps; the expected instability cuts the layers again
for 44 draws. All of it should stay below a second on one core. `--help` starts Python, typer and rich and nothing else.

Run: python bench/plan_speed.py [--repeat N]

Output: a line for each objective, budget and number of groups with wall and CPU seconds (the least of N runs), without
reading the statistics from disk; then the time of `reap-serve plan --help`; the last line is JSON
{"limit_seconds": 1.0, "slowest_seconds": X, "slowest_cpu_seconds": C, "ratio": X / limit, "help_seconds": Y,
"plans": {name: seconds}}. On a machine that does other work the CPU seconds are the ones to read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time

import numpy as np

from reap_serve.model import Fingerprint
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.limits import ModelLimits
from reap_serve.plan.planner import format_plan, make_plan
from reap_serve.plan.request import Budget, Objective, PlanRequest, Size
from reap_serve.records import provenance
from reap_serve.statistics.record import PHASES, ExpertSums, Header, Layer, Statistics, Window

NUM_SLICES, NUM_LAYERS, NUM_EXPERTS, TOP_K = 20, 61, 384, 8
LIMIT_SECONDS = 1.0
OBJECTIVES: tuple[Objective, ...] = ("mean", "max-min")
BUDGETS: tuple[tuple[Budget, bool], ...] = (("uniform", False), ("global", False), ("global", True))


def specialised_statistics(seed: int = 0) -> Statistics:
    """Sums of a made-up model in which each slice has experts of its own, of 1 : 10 : 100 tokens by slice."""
    rng = np.random.default_rng(seed)
    shape = (NUM_SLICES, NUM_LAYERS, NUM_EXPERTS)
    own = (rng.random(shape) < 0.15) * rng.lognormal(1.5, 0.5, shape)
    reap = 0.5 * rng.lognormal(0, 1, (1, *shape[1:])) + own
    volume = 10 ** (np.arange(NUM_SLICES) % 3)
    counts = rng.integers(100, 1000, shape) * TOP_K * volume[:, None, None]
    phased = [np.stack([value, np.zeros_like(value)], axis=1) for value in (counts, reap)]
    counts_SPLE, reap_SPLE = phased
    assert counts_SPLE.shape[1] == len(PHASES)
    sums = ExpertSums(
        token_count_SPLE=counts_SPLE,
        gate_sum_SPLE=0.5 * counts_SPLE,
        norm_sum_SPLE=2 * reap_SPLE * counts_SPLE,
        norm_sq_sum_SPLE=5 * reap_SPLE**2 * counts_SPLE,
        weighted_norm_sum_SPLE=reap_SPLE * counts_SPLE,
        weighted_norm_sq_sum_SPLE=1.5 * reap_SPLE**2 * counts_SPLE,
        norm_max_SPLE=10 * reap_SPLE,
        activation_max_SPLE=reap_SPLE,
    )
    model = Fingerprint(
        architecture="qwen3_moe",
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype="bfloat16",
        quantization=None,
        config_sha256="0" * 64,
        weights_sha256="0" * 64,
    )
    now = provenance().created
    window = Window(
        id="bench",
        started=now,
        ended=now,
        recorder="inline",
        requests=1,
        prompt_tokens_total=1,
        prompt_tokens_computed=1,
        sample_fraction=1.0,
        complete=True,
    )
    header = Header(
        schema_version=1,
        model=model,
        layers=tuple(Layer(index=index, name=f"model.layers.{index}.mlp.experts") for index in range(NUM_LAYERS)),
        slices=tuple(f"slice{number}" for number in range(NUM_SLICES)),
        windows=(window,),
        engine={},
        provenance=provenance(),
    )
    return Statistics(header, sums, counts_SPLE.sum(axis=-1) // TOP_K)


def plan_seconds(statistics: Statistics, request: PlanRequest, model: ModelLimits) -> tuple[float, float]:
    """Wall and CPU seconds from sums in memory to the bytes of the plan."""
    wall, cpu = time.perf_counter(), time.process_time()
    evidence = gather(statistics, request, model)
    format_plan(make_plan(statistics.header, evidence, decide(evidence, request.size)))
    return time.perf_counter() - wall, time.process_time() - cpu


def help_seconds() -> float:
    """Wall seconds of `reap-serve plan --help`."""
    started = time.perf_counter()
    command = [sys.executable, "-c", "from reap_serve.cli.app import main; main()", "plan", "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Times every objective, budget and number of groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    statistics = specialised_statistics()
    plans: dict[str, float] = {}
    slowest_cpu = 0.0
    for num_groups, objective, (budget, pad_to_max) in itertools.product((1, 8), OBJECTIVES, BUDGETS):
        model = ModelLimits("qwen3_moe", NUM_EXPERTS, TOP_K, num_groups, max(1, num_groups // 2))
        request = PlanRequest(Size(keep_fraction=0.5), objective=objective, budget=budget, pad_to_max=pad_to_max)
        wall, cpu = min(plan_seconds(statistics, request, model) for _ in range(repeat))
        name = f"{objective} {budget}{' padded' if pad_to_max else ''} groups={num_groups}"
        plans[name] = wall
        slowest_cpu = max(slowest_cpu, cpu)
        print(f"{name:34} {wall:6.3f} s wall {cpu:6.3f} s CPU")
    help_wall = min(help_seconds() for _ in range(repeat))
    print(f"{'plan --help':34} {help_wall:6.3f} s wall")
    slowest = max(plans.values())
    print(
        json.dumps(
            {
                "limit_seconds": LIMIT_SECONDS,
                "slowest_seconds": slowest,
                "slowest_cpu_seconds": slowest_cpu,
                "ratio": slowest / LIMIT_SECONDS,
                "help_seconds": help_wall,
                "plans": plans,
            }
        )
    )


if __name__ == "__main__":
    main()
