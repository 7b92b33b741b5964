"""Tokens a second of `observe` against the two offline ways, on the same model and the same sequences, in one run.

Theory. `observe` runs each token through its K experts once, in vLLM's fused kernel, and reads the norms. The reference
way (the observer of arXiv 2510.13999's code) runs the model in transformers and, beside it, every expert on every
token: E/K times the experts' work. llm-compressor's REAPPruningModifier (0.14) runs the model in transformers with the
experts taken apart into linear layers, and measures the routed tokens alone. None is charged for loading, tracing or
pruning: the clock runs over the forward passes, after one batch of warm-up.

Run: python bench/observe_vs_offline.py --llmcompressor-python VENV/bin/python [--model embedded|large|DIR]
         [--sequences 64] [--tokens 256] [--turns 3]
     python bench/observe_vs_offline.py --make-environment VENV
     The second makes the environment: llm-compressor wants other releases of compressed-tensors and transformers than
     vLLM, and takes torch and the rest from this one. `--model` is as in observe_overhead.py, on random token ids.
     The three run one after the other, each in a process of its own, TURNS times. Three minutes for `embedded`.

Output: one JSON document: model, sequences, tokens, turns, tokens_per_second of observe, reference and llmcompressor
(medians), observe_over_reference and observe_over_llmcompressor (medians of the turns' ratios) with their spreads
(smallest, largest), saliency_difference (largest relative difference of g|f| means between observe and the reference,
over experts with 100 tokens or more: bfloat16 against bfloat16).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from timed_engine import SHAPES, VOCABULARY, build

BATCH_SEQUENCES = 8
MINIMUM_TOKENS = 100
WAYS = ("observe", "reference", "llmcompressor")


def sequences(count: int, tokens: int) -> list[list[int]]:
    """The traffic: random token ids."""
    import numpy as np

    return np.random.default_rng(0).integers(3, VOCABULARY, size=(count, tokens)).tolist()  # type: ignore[no-any-return]


def observe(model: str, rows: list[list[int]]) -> dict[str, Any]:
    """As `reap-serve observe --recorder inline` runs its batches, from token ids."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import SamplingParams

    from reap_serve.adapter.offline import collect, start_engine
    from reap_serve.model import fingerprint, open_model
    from reap_serve.record.settings import ObserveSettings

    source = open_model(model)
    arguments = {"skip_tokenizer_init": True, "max_model_len": len(rows[0]) + 1, "dtype": "bfloat16"}
    llm = start_engine(source, ObserveSettings(recorder="inline"), arguments)
    parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in rows]
    llm.generate(prompts[:BATCH_SEQUENCES], parameters, use_tqdm=False)
    llm.collective_rpc("reap_reset")
    started = time.perf_counter()
    llm.generate(prompts, parameters, use_tqdm=False)
    seconds = time.perf_counter() - started
    sums = collect(llm, fingerprint(source)).sums
    count_LE = sums.token_count_SPLE.sum(axis=(0, 1))
    sum_LE = sums.weighted_norm_sum_SPLE.sum(axis=(0, 1))
    return {"seconds": seconds, "counts": count_LE.tolist(), "sums": sum_LE.tolist()}


def reference(model: str, rows: list[list[int]]) -> dict[str, Any]:
    """The model in transformers, and every expert of every layer on every token."""
    import torch
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    blocks = [layer.mlp for layer in loaded.model.layers]
    num_experts, top_k = loaded.config.num_experts, loaded.config.num_experts_per_tok
    counts_LE = torch.zeros(len(blocks), num_experts, dtype=torch.float64)
    sums_LE = torch.zeros_like(counts_LE)

    def measure(index: int, block: Any, x_TH: torch.Tensor) -> None:
        x_TH = x_TH.reshape(-1, x_TH.shape[-1])
        gates_TE = torch.softmax(torch.nn.functional.linear(x_TH, block.gate.weight).float(), dim=-1)
        gate_TK, ids_TK = gates_TE.topk(top_k, dim=-1)
        gate_TK = gate_TK / gate_TK.sum(dim=-1, keepdim=True)
        for expert in range(num_experts):
            hidden_TI = torch.nn.functional.linear(x_TH, block.experts.gate_up_proj[expert])
            gate_TI, up_TI = hidden_TI.chunk(2, dim=-1)
            output_TH = torch.nn.functional.linear(
                torch.nn.functional.silu(gate_TI) * up_TI, block.experts.down_proj[expert]
            )
            norm_T = output_TH.float().norm(dim=-1)
            chosen_TK = ids_TK == expert
            counts_LE[index, expert] += chosen_TK.sum()
            sums_LE[index, expert] += (norm_T.unsqueeze(1) * gate_TK)[chosen_TK].double().sum()

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, inputs, index=index: measure(index, module, inputs[0]))
    batches = torch.tensor(rows).split(BATCH_SEQUENCES)
    with torch.inference_mode():
        loaded.model(batches[0])
        counts_LE.zero_()
        sums_LE.zero_()
        started = time.perf_counter()
        for batch in batches:
            loaded.model(batch)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "counts": counts_LE.tolist(), "sums": sums_LE.tolist()}


def llmcompressor(model: str, rows: list[list[int]]) -> dict[str, Any]:
    """REAPPruningModifier under its pipeline `basic`: whole forward passes, which costs it least."""
    import torch
    import transformers
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    times: list[float] = []
    loaded.register_forward_hook(lambda *_: times.append(time.perf_counter()))
    # One batch more than the others get: its end starts the clock.
    fed = rows[:BATCH_SEQUENCES] + rows
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict({"input_ids": fed, "attention_mask": [[1] * len(row) for row in fed]}),
        recipe=REAPPruningModifier(sparsity=0.5),
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(fed),
        batch_size=BATCH_SEQUENCES,
        shuffle_calibration_samples=False,
        moe_calibrate_all_experts=False,
        pipeline="basic",
    )
    assert len(times) == len(fed) // BATCH_SEQUENCES, f"{len(times)} forward passes"
    return {"seconds": times[-1] - times[0]}


def run(way: str, python: str, options: argparse.Namespace, model: str) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [python, __file__, "--way", way, "--model", model]
    command += ["--sequences", str(options.sequences), "--tokens", str(options.tokens)]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([*command, "--result", result.name], check=True, stdout=sys.stderr, env=environment)
        return json.loads(result.read())  # type: ignore[no-any-return]


def make_environment(directory: Path) -> None:
    """An environment with llm-compressor in front of the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    packages = next((directory / "lib").glob("python*")) / "site-packages"
    (packages / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [str(directory / "bin" / "python"), "-m", "pip", "install", "-q", "llmcompressor==0.14.0.1"]
    subprocess.run(install, check=True)


def saliency_difference(ours: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest relative difference of the means of g|f| over the experts that saw enough tokens."""
    import numpy as np

    counts, other_counts = np.array(ours["counts"]), np.array(reference["counts"])
    seen = np.minimum(counts, other_counts) >= MINIMUM_TOKENS
    mean = np.array(ours["sums"])[seen] / counts[seen]
    other = np.array(reference["sums"])[seen] / other_counts[seen]
    return float(np.max(np.abs(mean - other) / other))


def compare(model: str, options: argparse.Namespace) -> dict[str, object]:
    pythons = {"observe": sys.executable, "reference": sys.executable, "llmcompressor": options.llmcompressor_python}
    turns: list[dict[str, dict[str, Any]]] = []
    for number in range(options.turns):
        turns.append({way: run(way, pythons[way], options, model) for way in WAYS})
        print(f"turn {number}: { ({way: turns[-1][way]['seconds'] for way in WAYS}) }", file=sys.stderr, flush=True)
    total = options.sequences * options.tokens
    report: dict[str, object] = {
        "model": options.model,
        "sequences": options.sequences,
        "tokens": total,
        "turns": options.turns,
        "tokens_per_second": {
            way: round(statistics.median(total / turn[way]["seconds"] for turn in turns), 1) for way in WAYS
        },
    }
    for way in WAYS[1:]:
        ratios = [turn[way]["seconds"] / turn["observe"]["seconds"] for turn in turns]
        report[f"observe_over_{way}"] = round(statistics.median(ratios), 2)
        report[f"observe_over_{way}_spread"] = [round(min(ratios), 2), round(max(ratios), 2)]
    report["saliency_difference"] = round(saliency_difference(turns[0]["observe"], turns[0]["reference"]), 5)
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--llmcompressor-python")
    parser.add_argument("--make-environment", type=Path)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_environment:
        make_environment(options.make_environment)
        return
    if options.way:
        ways = {"observe": observe, "reference": reference, "llmcompressor": llmcompressor}
        result = ways[options.way](options.model, sequences(options.sequences, options.tokens))
        options.result.write_text(json.dumps(result))
        return
    if options.llmcompressor_python is None:
        parser.error("--llmcompressor-python is needed; --make-environment VENV makes one")
    with tempfile.TemporaryDirectory() as directory:
        model = options.model
        if model in SHAPES:
            build(SHAPES[model], Path(directory))
            model = directory
        print(json.dumps(compare(model, options)))


if __name__ == "__main__":
    main()
