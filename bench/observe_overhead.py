"""Throughput and inter-token latency of an observed engine against a plain one on the same requests, in turn.

Theory: vLLM's CPU kernel leaves the rows f_j(x) in memory, so that what recording adds is one reading of N*H*4 bytes
(N routed slots) beside 2*3*N*H*I flops: 0.06 of a layer's time at 1 TFLOP/s and 18 GB/s for I = 768, and a fixed tenth
of a millisecond a layer of operations on N numbers, which only small models notice. With --recompute nothing is read:
`inline` runs the fused kernel over K times as many rows, `deferred` copies the sampled inputs and runs the kernel over
them again, as other kernels need. The governor chooses the fraction of `deferred` such that its own time is at most its
budget, 2 % by default.

Run: python bench/observe_overhead.py [--model embedded|large|DIR] [--recorder inline|deferred|plain] [--compiled]
         [--recompute] [--turns N] [--requests N] [--engines N]
     `embedded` is a random Qwen3-MoE of the shape of the model that ships with the project, `large` one with hidden
     2048, moe intermediate 768, 64 experts, top-8, 2 layers (2.6 GB of memory an engine). `inline` is measured on
     prefill, which is what `observe` runs; `deferred` on a server's mix, 16 requests in flight of 128 prompt and 48
     answer tokens. VLLM_CPU_OMP_THREADS_BIND=0 runs both on one core, where CPU time holds no waiting for threads.
     `plain` compares the plain engine with itself: what the machine adds.
     There are N engines of each kind, one process each, which stay up and run the requests in turn, so that the
     machine's load hits all. Where others use the machine, its speed changes within seconds, and many short turns tell
     more than few long ones: a turn is one wave of requests. Two processes of one kind differ by up to 4 %, by where
     their memory lies; so glibc is told, for both kinds, not to hand freed memory back and fault it in again at each
     step (vLLM's guide for CPUs recommends TCMalloc for that), and a turn's ratio is of the means over the engines of a
     kind. Four to six minutes.

Output: one JSON document: model, recorder, workload, compiled, recorder_class, turns, tokens_per_second of plain and
observed (medians), throughput_ratio (observed / plain: median of the turns' ratios), throughput_ratio_spread (quartiles
of the turns), throughput_ratio_interval (95 % interval of that median, for these processes: others move it by a point
or two), engine_ratios (by pair of engines: median of the turns), best_throughput_ratio (of the best turns: what counts
on a machine that others use), cpu_ratio (plain / observed CPU seconds), itl_p99_ratio with its spread (observed /
plain; deferred only), sample_fraction (of the last turn). Wanted: inline throughput_ratio >= 0.88; deferred
throughput_ratio >= 0.98, itl_p99_ratio <= 1.05.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "embedded": {
        "hidden_size": 192,
        "moe_intermediate_size": 128,
        "num_experts": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "large": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
VOCABULARY = 4096
IN_FLIGHT, PROMPT_TOKENS, ANSWER_TOKENS = 16, 128, 48
PREFILL_TOKENS = 256
OBSERVED: dict[str, dict[str, Any]] = {
    "inline": {"recorder": "inline"},
    "deferred": {"recorder": "deferred", "overhead_budget": 0.02},
}


def build(shape: dict[str, object], directory: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, intermediate_size=384, norm_topk_prob=True, max_position_embeddings=2048, **shape
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.init_weights()
    model.save_pretrained(directory)


def serve(options: argparse.Namespace) -> None:
    """The child: an engine that runs the requests once for every line it reads."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import numpy as np
    from vllm import LLM, SamplingParams

    observing: dict[str, Any] = {}
    if options.recorder in OBSERVED:
        settings = OBSERVED[options.recorder] | {"read_kernel_rows": not options.recompute}
        observing = {
            "additional_config": {"reap_serve": settings},
            "worker_extension_cls": "reap_serve.observe.worker.ReapWorkerExtension",
        }
    llm = LLM(
        options.serve,
        skip_tokenizer_init=True,
        enforce_eager=not options.compiled,
        max_model_len=1024,
        enable_prefix_caching=False,
        **observing,
    )
    random = np.random.default_rng(0)
    prefill = options.workload == "prefill"
    prompt_tokens, answer_tokens = (PREFILL_TOKENS, 1) if prefill else (PROMPT_TOKENS, ANSWER_TOKENS)
    prompts = [random.integers(0, VOCABULARY, size=prompt_tokens).tolist() for _ in range(options.requests)]
    parameters = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    in_flight = len(prompts) if prefill else IN_FLIGHT
    observer = None
    if observing:
        observer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.reap_live.observer
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        result: dict[str, Any] = dict(run(llm.llm_engine, prompts, parameters, in_flight))
        if observer is not None:
            result["sample_fraction"] = observer.sample_fraction
            result["recorder_class"] = type(observer._recorders[0]).__name__
        print(json.dumps(result), file=answers, flush=True)


def run(engine: Any, prompts: list[list[int]], parameters: Any, in_flight: int) -> dict[str, float]:
    """Keeps `in_flight` requests going until all are answered."""
    waiting = list(enumerate(prompts))
    seen: dict[str, tuple[int, float]] = {}
    intervals: list[float] = []
    tokens = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    active = 0
    while waiting or active:
        while waiting and active < in_flight:
            number, prompt = waiting.pop(0)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
            active += 1
        for output in engine.step():
            now, count = time.perf_counter(), len(output.outputs[0].token_ids)
            before, when = seen.get(output.request_id, (0, now))
            if before and count > before:
                intervals.append((now - when) / (count - before))
            seen[output.request_id] = (count, now)
            if output.finished:
                active -= 1
                tokens += count + len(output.prompt_token_ids)
    seconds = time.perf_counter() - started
    intervals.sort()
    return {
        "tokens_per_second": tokens / seconds,
        "cpu_seconds": time.process_time() - cpu_started,
        "itl_p99": intervals[int(0.99 * len(intervals))] if intervals else 0.0,
        "itl_p50": intervals[len(intervals) // 2] if intervals else 0.0,
    }


# Freed memory stays with the process, up to a gigabyte at the top of its heap.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


class Engine:
    """A child process with an engine."""

    def __init__(self, model: str, recorder: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", model, "--recorder", recorder, "--workload", options.workload]
        command += [f"--{name}" for name in ("compiled", "recompute") if getattr(options, name)]
        self.process = subprocess.Popen(
            [*command, "--requests", str(options.requests)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ALLOCATOR,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready", "the engine did not start"

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def close(self) -> None:
        self.process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--recorder", choices=["plain", *OBSERVED], default="inline")
    parser.add_argument("--workload", choices=["prefill", "serve"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--engines", type=int)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    options.workload = options.workload or ("prefill" if options.recorder == "inline" else "serve")
    large, prefill = options.model == "large", options.workload == "prefill"
    # Turns of a third of a second, of two to four seconds with the large model.
    options.turns = options.turns or ((24 if prefill else 16) if large else 90)
    options.requests = options.requests or (64 if prefill and not large else IN_FLIGHT)
    options.engines = options.engines or (2 if large else 3)
    with tempfile.TemporaryDirectory() as directory:
        model = options.model
        if model in SHAPES:
            build(SHAPES[model], Path(directory))
            model = directory
        print(json.dumps(compare(model, options)))


def compare(model: str, options: argparse.Namespace) -> dict[str, object]:
    pairs = [
        (Engine(model, "plain", options), Engine(model, options.recorder, options)) for _ in range(options.engines)
    ]
    for engine in (engine for pair in pairs for engine in pair):
        engine.turn()  # warm-up
    turns, by_pair = [], []
    for number in range(options.turns):
        results = []
        for pair in pairs:
            order = pair if number % 2 == 0 else pair[::-1]
            answers = {engine: engine.turn() for engine in order}
            results.append((answers[pair[0]], answers[pair[1]]))
        by_pair.append([b["tokens_per_second"] / a["tokens_per_second"] for a, b in results])
        turns.append((mean_of([a for a, _ in results]), mean_of([b for _, b in results])))
        print(f"turn {number}: {turns[-1]}", file=sys.stderr, flush=True)
    for engine in (engine for pair in pairs for engine in pair):
        engine.close()
    throughput = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in turns]
    report: dict[str, object] = {
        "model": options.model,
        "recorder": options.recorder,
        "workload": options.workload,
        "compiled": options.compiled,
        "recorder_class": turns[-1][1].get("recorder_class"),
        "turns": options.turns,
        "plain_tokens_per_second": round(statistics.median(a["tokens_per_second"] for a, _ in turns), 1),
        "observed_tokens_per_second": round(statistics.median(b["tokens_per_second"] for _, b in turns), 1),
        "throughput_ratio": round(statistics.median(throughput), 4),
        "throughput_ratio_spread": quartiles(throughput),
        "throughput_ratio_interval": median_interval(throughput),
        "engine_ratios": [round(statistics.median(ratios), 4) for ratios in zip(*by_pair, strict=True)],
        "best_throughput_ratio": round(
            max(b["tokens_per_second"] for _, b in turns) / max(a["tokens_per_second"] for a, _ in turns), 4
        ),
        "cpu_ratio": round(statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in turns), 4),
        "sample_fraction": turns[-1][1].get("sample_fraction"),
    }
    if options.workload == "serve":
        latency = [b["itl_p99"] / a["itl_p99"] for a, b in turns]
        report["itl_p99_ratio"] = round(statistics.median(latency), 4)
        report["itl_p99_ratio_spread"] = quartiles(latency)
    return report


def mean_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over some engines, and the first engine's text."""
    return {
        name: value if isinstance(value, str) else statistics.fmean(result[name] for result in results)
        for name, value in results[0].items()
    }


def median_interval(values: list[float]) -> list[float]:
    """Where the median lies with 95 % confidence, whatever the distribution: between the ranks n/2 -+ 0.98 sqrt(n)."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low = max(0, int(len(values) / 2 - half))
    return [round(ordered[low], 4), round(ordered[-1 - low], 4)]


def quartiles(values: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4)
    return [round(first, 4), round(third, 4)]


if __name__ == "__main__":
    main()
