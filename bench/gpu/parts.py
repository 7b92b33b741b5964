"""The parts of the check. Each is a process of its own: `python -m bench.gpu.parts NAME` prints one JSON document.

`exact_*`      counts equal to an oracle in PyTorch, saliency within 1 %, on every token
`sampled_*`    the same of a sample: what is recorded is right, and the share of tokens near the fraction asked for
`identical_*`  token ids and logprobs of an observed engine are those of a plain one, bit for bit
`fp8_block`    FP8 block weights quantised on the spot, counts equal and saliency within 5 % of the unquantised oracle
`masks_*`      rows under a plan get no dropped expert, the others do, and only the others are counted; under graphs
               plans come after the capture, one after the other into one place
`shadow_*`     the dropped gate mass of a pruned model is that of its full routers in PyTorch
`throughput`   plain against observed in turn, real layer shapes, 1, 16 and 128 sequences
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu import engines, models
from bench.gpu.oracle import COLUMNS, Oracle, snapshot, watched
from bench.gpu.plans import masks, shadow

SALIENCY_TOLERANCE, FP8_TOLERANCE = 0.01, 0.05
Result = dict[str, Any]


def exact(
    graphs: str,
    recorder: str,
    *,
    fraction: float = 1.0,
    tolerance: float = SALIENCY_TOLERANCE,
    second_runner: bool | None = None,
    **arguments: Any,
) -> Result:
    """The sums of one recorder against the oracle."""
    from vllm import SamplingParams

    from reap_serve.adapter import layer_view

    settings = {"recorder": recorder, "sample_fraction": fraction, "read_kernel_rows": False}
    with tempfile.TemporaryDirectory() as directory:
        oracle = Oracle(models.write_small(Path(directory)), models.SMALL.experts)
        with watched(oracle):
            llm = engines.start(Path(directory), graphs, settings, second_runner=second_runner, **arguments)
        try:
            oracle.follow(engines.runner_of(llm).reap_live)
            # What vLLM ran to warm up is no traffic.
            before = llm.collective_rpc("reap_status")[0]["tokens_observed"]
            parameters = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
            for count, length in ((3, 40), (16, 20), (1, 700)):
                llm.generate(engines.prompts(count, length, seed=count), parameters, use_tqdm=False)
            found, window = snapshot(llm)
            kernel = layer_view.kernel_name(layer_view.moe_layers(llm.llm_engine.vllm_config)[0])
        finally:
            engines.stop(llm)
    result = _judged(found, oracle.sums_LEC, window, kernel, fraction, tolerance)
    return {**result, "tokens_before_traffic": before, "passed": result["passed"] and before == 0}


def _judged(
    found_LEC: np.ndarray, expected_LEC: np.ndarray, window: Any, kernel: str, fraction: float, tolerance: float
) -> Result:
    tokens, recorded = expected_LEC[..., 0].sum(axis=1), found_LEC[..., 0].sum(axis=1)
    result: Result = {
        "kernel": kernel,
        "recorder": window.recorder,
        "complete": window.complete,
        "routed_tokens": int(tokens[0]),
        "recorded_fraction": float(recorded.sum() / tokens.sum()),
    }
    if fraction == 1.0:
        result["counts_equal"] = bool(np.array_equal(found_LEC[..., 0], expected_LEC[..., 0]))
        scale = np.maximum(np.abs(expected_LEC), 1e-9)
        result["largest_error"] = {
            name: float(np.max(np.abs(found_LEC - expected_LEC)[..., column] / scale[..., column]))
            for column, name in enumerate(COLUMNS)
        }
        result["passed"] = result["counts_equal"] and max(result["largest_error"].values()) <= tolerance
    else:
        # Of n tokens a share p, by chance: four standard errors, steps taken as a whole count as one.
        error = 4 * (fraction * (1 - fraction) * 64 / (tokens[0] / models.SMALL.top_k)) ** 0.5
        mean = found_LEC[..., 3].sum(axis=1) / np.maximum(recorded, 1)
        wanted = expected_LEC[..., 3].sum(axis=1) / tokens
        result["largest_error"] = {"mean saliency": float(np.max(np.abs(mean / wanted - 1)))}
        result["passed"] = abs(result["recorded_fraction"] - fraction) <= error and bool(
            result["largest_error"]["mean saliency"] < 0.1
        )
    result["passed"] = bool(result["passed"] and window.complete)
    return result


def identical(graphs: str) -> Result:
    """Outputs and logprobs of an observed engine against a plain one."""
    from vllm import SamplingParams

    answers = []
    with tempfile.TemporaryDirectory() as directory:
        models.write_small(Path(directory))
        parameters = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False, logprobs=4)
        # Twice plain: what differs then differs by itself.
        for settings in (None, None, {"overhead_budget": 0.02}):
            llm = engines.start(Path(directory), graphs, settings)
            outputs = llm.generate(engines.prompts(16, 60), parameters, use_tqdm=False)
            answers.append([_answer(output.outputs[0]) for output in outputs])
            engines.stop(llm)
    return {
        "passed": answers[0] == answers[2],
        "plain_repeats": answers[0] == answers[1],
        "requests": len(answers[0]),
    }


def _answer(output: Any) -> tuple[tuple[int, ...], tuple[tuple[tuple[int, float], ...], ...]]:
    logprobs = tuple(
        tuple(sorted((token, entry.logprob) for token, entry in place.items())) for place in output.logprobs
    )
    return tuple(output.token_ids), logprobs


def throughput(**arguments: Any) -> Result:
    """See `throughput.compare`."""
    from bench.gpu.throughput import compare

    return compare(**arguments)


PARTS: Mapping[str, Callable[[], Result]] = {
    "exact_deferred_eager": partial(exact, "eager", "deferred"),
    "exact_moe_sum_eager": partial(exact, "eager", "moe_sum"),
    "exact_deferred_full": partial(exact, "full", "deferred"),
    "exact_deferred_full_first_runner": partial(exact, "full", "deferred", second_runner=False),
    "exact_moe_sum_full": partial(exact, "full", "moe_sum"),
    "exact_deferred_full_decode_only": partial(exact, "full_decode_only", "deferred"),
    "exact_auto_default": partial(exact, "default", "auto"),
    "sampled_deferred_full": partial(exact, "full", "deferred", fraction=0.25),
    "throughput": throughput,
    "identical_eager": partial(identical, "eager"),
    "identical_full": partial(identical, "full"),
    "exact_deferred_piecewise": partial(exact, "piecewise", "deferred"),
    "fp8_block": partial(exact, "full", "deferred", tolerance=FP8_TOLERANCE, quantization="fp8_per_block"),
    "masks_eager": partial(masks, "eager"),
    "masks_default": partial(masks, "default"),
    # Of a graph's 512 rows 64 land: an eighth of the tokens is measured.
    "shadow_default": partial(shadow, "default", tolerance=0.03),
    "identical_default": partial(identical, "default"),
}
# What runs on a CPU, too: a rehearsal.
REHEARSAL: Mapping[str, Callable[[], Result]] = {
    **{name: PARTS[name] for name in ("exact_deferred_eager", "identical_eager", "masks_eager")},
    "exact_inline_eager": partial(exact, "eager", "inline"),
    "exact_deferred_pretended": partial(exact, engines.PRETENDED, "deferred"),
    "masks_pretended": partial(masks, engines.PRETENDED),
    "shadow_pretended": partial(shadow, engines.PRETENDED, tolerance=0.005),
    "shadow_eager": partial(shadow, "eager", tolerance=0.005),
    "sampled_deferred_eager": partial(exact, "eager", "deferred", fraction=0.25),
    # Two short turns of the small model, whose ratio says nothing.
    "throughput_small": partial(
        throughput, graphs="eager", sequences=(1, 4), turns=1, shape=models.SMALL, lowest_ratio=0.0
    ),
}


def main() -> None:
    """Runs one part; what vLLM prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name = sys.argv[1]
    print(json.dumps({**PARTS, **REHEARSAL}[name]()), file=answers, flush=True)


if __name__ == "__main__":
    main()
