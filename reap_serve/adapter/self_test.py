"""A self-test of one recorder: a random model in vLLM on this machine, against plain PyTorch.

The reference takes the routed inputs that vLLM showed to the recorder, computes every expert's output in float32 from
the checkpoint's weights, and compares the sums: counts exactly, the others as closely as vLLM's bfloat16 allows.

Axes: T tokens, K experts per token, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.adapter import engine_view, layer_view
from reap_serve.adapter.engine_log import stdout_to_stderr
from reap_serve.adapter.failures import engine_failures
from reap_serve.adapter.offline import start_engine, stop_engine
from reap_serve.errors import ReapServeError
from reap_serve.model import open_model
from reap_serve.record.accumulate import FORMULAS, SUM_COLUMNS, RowMeasures
from reap_serve.record.recorder import Moment
from reap_serve.record.settings import ObserveSettings, RecorderName
from reap_serve.record.snapshot import RankSums
from reap_serve.records import JsonValue, Record

if TYPE_CHECKING:
    from reap_serve.record.tap import Tap

NUM_EXPERTS, TOP_K, VOCABULARY, NUM_TOKENS = 8, 2, 128, 200
# Of sums over rows that vLLM computes in bfloat16 (unit 2^-8). Rounding to it errs either way, and errors of a row's
# components average out: 1 % is far above them. On x86 CPUs without AVX512-BF16 vLLM cuts off instead: each of the two
# conversions of an expert's path takes up to 2^-8, all in one direction, and squares take twice that: 4 * 2^-8 = 1.6 %.
ROUNDED_TOLERANCE, TRUNCATED_TOLERANCE = 1e-2, 2e-2

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SelfTest(Record):
    """What a self-test found.

    Attributes:
        recorder: Which recorder.
        passed: Whether its sums are right.
        detail: What was compared, or what went wrong.
        kernel: Class of the kernel that ran the experts, with its instruction set on a CPU.
        largest_relative_error: Of any sum; None when the engine did not run.
        seconds: Time taken, the engine's start included.
    """

    recorder: str
    passed: bool
    detail: str
    kernel: str | None
    largest_relative_error: float | None
    seconds: float


def bfloat16_tolerance() -> float:
    """Largest relative error of a right sum over rows that vLLM computes in bfloat16 on this machine."""
    return TRUNCATED_TOLERANCE if engine_view.truncates_to_bfloat16() else ROUNDED_TOLERANCE


class _Spy:
    """Keeps what a tap is shown."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self.calls: list[Call] = []

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor | None:
        self.calls.append((x_TH.float(), gate_TK.clone(), expert_ids_TK.long()))
        return self._tap.record(x_TH, gate_TK, expert_ids_TK)


def self_test(recorder: RecorderName, *, read_kernel_rows: bool) -> SelfTest:
    """Runs one recorder on this machine, with leave to read the kernel's rows or without."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as directory, stdout_to_stderr():
            weights = _write_model(Path(directory))
            kernel, how, observed, calls = _observe(Path(directory), recorder, read_kernel_rows)
    except ReapServeError as failure:
        return SelfTest(
            recorder=recorder,
            passed=False,
            detail=str(failure),
            kernel=None,
            largest_relative_error=None,
            seconds=round(time.monotonic() - started, 1),
        )
    expected = _expected(weights, calls)
    found = observed.sums_SPLEC.sum(axis=(0, 1, 2))
    counts_equal = bool(np.array_equal(found[:, 0], expected[:, 0])) and found[:, 0].sum() == NUM_TOKENS * TOP_K
    error = float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1e-12)))
    return SelfTest(
        recorder=recorder,
        passed=counts_equal and error <= bfloat16_tolerance() and observed.window.complete,
        detail=f"{how}, {int(found[:, 0].sum())} routed tokens of {NUM_EXPERTS} experts, "
        f"counts {'equal' if counts_equal else 'differ'}, sums differ by at most {error:.2%}",
        kernel=kernel,
        largest_relative_error=error,
        seconds=round(time.monotonic() - started, 1),
    )


def _write_model(directory: Path) -> Mapping[str, torch.Tensor]:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    experts = model.model.layers[0].mlp.experts
    return {"gate_up": experts.gate_up_proj.detach().float(), "down": experts.down_proj.detach().float()}


def _observe(directory: Path, recorder: RecorderName, read_kernel_rows: bool) -> tuple[str, str, RankSums, list[Call]]:
    from vllm import SamplingParams

    settings = ObserveSettings(recorder=recorder, buffer_tokens=64, read_kernel_rows=read_kernel_rows)
    arguments: dict[str, JsonValue] = {
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "dtype": "bfloat16",
        "enforce_eager": True,
    }
    llm = start_engine(open_model(str(directory)), settings, arguments)
    try:
        llm.collective_rpc("reap_reset")
        layer = layer_view.moe_layers(llm.llm_engine.vllm_config)[0]
        spy = _Spy(layer.routed_experts.reap_tap)
        layer.routed_experts.reap_tap = spy
        random = np.random.default_rng(0)
        prompts = [{"prompt_token_ids": random.integers(0, VOCABULARY, NUM_TOKENS // 4).tolist()} for _ in range(4)]
        with engine_failures():
            llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), use_tqdm=False)
        observed = RankSums.from_bytes(llm.collective_rpc("reap_snapshot")[0])
        how = (
            "rows read in the kernel's memory" if layer.routed_experts.reap_moment is Moment.AFTER else "rows computed"
        )
        return layer_view.kernel_name(layer), how, observed, spy.calls
    finally:
        stop_engine(llm)


def _expected(weights: Mapping[str, torch.Tensor], calls: list[Call]) -> npt.NDArray[np.float64]:
    """The sums [E, columns] over outputs that plain PyTorch computes, in the order of `SUM_COLUMNS`."""
    sums = np.zeros((NUM_EXPERTS, len(SUM_COLUMNS)))
    for x_TH, gate_TK, ids_TK in calls:
        for expert in range(NUM_EXPERTS):
            token_N, slot_N = torch.where(ids_TK == expert)
            gate_NI, up_NI = (x_TH[token_N] @ weights["gate_up"][expert].T).chunk(2, dim=-1)
            output_NH = (torch.nn.functional.silu(gate_NI) * up_NI) @ weights["down"][expert].T
            norm_N, gate_N = output_NH.double().norm(dim=-1), gate_TK[token_N, slot_N].double()
            routes = RowMeasures(gate_N, norm_N, gate_N * norm_N, output_NH.double().abs().amax(dim=-1))
            sums[expert] += torch.stack([FORMULAS[name](routes) for name in SUM_COLUMNS]).sum(dim=1).numpy()
    return sums
