"""Throughput and inter-token latency of an observed engine against a plain one on the same requests, in turn.

Theory: `inline` runs the fused kernel over K times as many rows of one expert each; the matrix products stay the same
2 * 3 * H * I flops a routed slot, the rows written grow K-fold, and one pass over them measures them. `deferred` copies
the sampled rows and runs the same kernel over its buffer: at a fraction p of the tokens it adds p of the MoE time, and
the governor chooses p so that its own time is at most its budget, 2 % by default.

Run: python bench/observe_overhead.py [--model embedded|large|DIR] [--recorder inline|deferred] [--turns 5]
     `embedded` is a random Qwen3-MoE of the shape of the model that ships with the project, `large` one with hidden
     2048, moe intermediate 768, 64 experts, top-8, 2 layers (2.6 GB of memory an engine). `inline` is measured on
     prefill, which is what `observe` runs; `deferred` on a server's mix, 16 requests in flight of 128 prompt and 48
     answer tokens. VLLM_CPU_OMP_THREADS_BIND=0 runs both on one core, where CPU time holds no waiting for threads.
     Both engines stay up, one process each, and run the requests alternately, so that the machine's load hits both.

Output: one JSON document: model, recorder, kernel, turns, tokens_per_second of plain and observed (medians),
throughput_ratio (observed / plain: median of the turns' ratios), throughput_ratio_spread (smallest, largest),
best_throughput_ratio (of each engine's best turn: what counts on a machine that others use),
cpu_ratio (plain / observed CPU seconds), itl_p99_ratio with its spread (observed / plain; deferred only),
sample_fraction. Wanted: inline throughput_ratio >= 0.88; deferred throughput_ratio >= 0.98, itl_p99_ratio <= 1.05.
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
OBSERVED = {
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


def serve(model: str, recorder: str, requests: int) -> None:
    """The child: an engine that runs the requests once for every line it reads."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import numpy as np
    from vllm import LLM, SamplingParams

    observing: dict[str, Any] = {}
    if recorder in OBSERVED:
        observing = {
            "additional_config": {"reap_serve": OBSERVED[recorder]},
            "worker_extension_cls": "reap_serve.observe.worker.ReapWorkerExtension",
        }
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        enable_prefix_caching=False,
        **observing,
    )
    kind = sys.argv[sys.argv.index("--workload") + 1]
    random = np.random.default_rng(0)
    prompt_tokens, answer_tokens = (PREFILL_TOKENS, 1) if kind == "prefill" else (PROMPT_TOKENS, ANSWER_TOKENS)
    prompts = [random.integers(0, VOCABULARY, size=prompt_tokens).tolist() for _ in range(requests)]
    parameters = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    in_flight = len(prompts) if kind == "prefill" else IN_FLIGHT
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run(llm.llm_engine, prompts, parameters, in_flight)), file=answers, flush=True)


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


class Engine:
    """A child process with an engine."""

    def __init__(self, model: str, recorder: str, workload: str, requests: int) -> None:
        command = [sys.executable, __file__, "--serve", model, "--recorder", recorder, "--workload", workload]
        self.process = subprocess.Popen(
            [*command, "--requests", str(requests)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready", "the engine did not start"

    def turn(self) -> dict[str, float]:
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
    parser.add_argument("--recorder", default="inline")
    parser.add_argument("--workload", choices=["prefill", "serve"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.recorder, options.requests)
        return
    workload = options.workload or ("prefill" if options.recorder == "inline" else "serve")
    with tempfile.TemporaryDirectory() as directory:
        model = options.model
        if model in SHAPES:
            build(SHAPES[model], Path(directory))
            model = directory
        print(json.dumps(compare(model, options, workload)))


def compare(model: str, options: argparse.Namespace, workload: str) -> dict[str, object]:
    plain = Engine(model, "plain", workload, options.requests)
    observed = Engine(model, options.recorder, workload, options.requests)
    for engine in (plain, observed):
        engine.turn()  # warm-up
    turns = []
    for number in range(options.turns):
        order = (plain, observed) if number % 2 == 0 else (observed, plain)
        results = {engine: engine.turn() for engine in order}
        turns.append((results[plain], results[observed]))
        print(f"turn {number}: {turns[-1]}", file=sys.stderr, flush=True)
    plain.close()
    observed.close()
    throughput = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in turns]
    report: dict[str, object] = {
        "model": options.model,
        "recorder": options.recorder,
        "workload": workload,
        "turns": options.turns,
        "plain_tokens_per_second": round(statistics.median(a["tokens_per_second"] for a, _ in turns), 1),
        "observed_tokens_per_second": round(statistics.median(b["tokens_per_second"] for _, b in turns), 1),
        "throughput_ratio": round(statistics.median(throughput), 4),
        "throughput_ratio_spread": [round(min(throughput), 4), round(max(throughput), 4)],
        "best_throughput_ratio": round(
            max(b["tokens_per_second"] for _, b in turns) / max(a["tokens_per_second"] for a, _ in turns), 4
        ),
        "cpu_ratio": round(statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in turns), 4),
    }
    if workload == "serve":
        latency = [b["itl_p99"] / a["itl_p99"] for a, b in turns]
        report["itl_p99_ratio"] = round(statistics.median(latency), 4)
        report["itl_p99_ratio_spread"] = [round(min(latency), 4), round(max(latency), 4)]
    return report


if __name__ == "__main__":
    main()
