"""Runs a few lines of the installed vLLM on numbers worked out by hand, and tells whether it gets them wrong.

A stock, a patched and a mended vLLM are told apart by what they do, whatever their version says. Nothing here starts an
engine or reads a checkpoint. Every probe gives True where the defect is there.
"""

from __future__ import annotations

import dis
import math
import subprocess
import sys
from types import SimpleNamespace

COMMAND_SECONDS = 180.0
LAGUNA_BIAS = "layers.0.mlp.experts.e_score_correction_bias"


def sigmoid_scores_fail() -> bool:
    """Whether the CPU router, without groups, does not give an expert the weight sigmoid(logit)."""
    try:
        weight, expert = _route([[2.0, 1.0]], scoring_func="sigmoid", renormalize=False)
    except AssertionError:
        return True
    return expert != 0 or not math.isclose(weight, 1 / (1 + math.exp(-2.0)), rel_tol=1e-5)


def softmax_bias_is_ignored() -> bool:
    """Whether the CPU router, without groups, chooses by softmax alone where a bias of 5 asks for the other expert."""
    import torch

    _, expert = _route([[2.0, 1.0]], renormalize=False, e_score_correction_bias=torch.tensor([0.0, 5.0]))
    return expert != 1


def _route(logits: list[list[float]], **settings: object) -> tuple[float, int]:
    """Weight and number of the one expert that the CPU router chooses for one token."""
    import torch
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    router = CPURouter(top_k=1, global_num_experts=len(logits[0]), **settings)
    weights_TK, ids_TK = router._compute_routing(torch.zeros(1, 1), torch.tensor(logits), None)
    return float(weights_TK[0, 0]), int(ids_TK[0, 0])


def rotary_counts_heads_as_tokens() -> bool:
    """Whether the CPU's rotary embedding turns the heads of [tokens, heads, size] by other angles than their token's.

    One token at position 1, two equal heads: the second must come out as the first.
    """
    import torch
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    size, positions = 32, torch.arange(4)
    angles = torch.outer(positions.float(), torch.ones(size // 2))
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
    layer = SimpleNamespace(
        head_size=size, cos_sin_cache=cache, is_neox_style=True, _match_cos_sin_cache_dtype=lambda query: cache
    )
    # The kernel reads positions past those given where it counts heads: they must lie in memory.
    query, key = torch.ones(1, 2, size), torch.ones(1, 1, size)
    turned, _ = RotaryEmbedding.forward_cpu(layer, positions[1:2], query, key)
    return not torch.allclose(turned[0, 0], turned[0, 1])


def laguna_bias_is_dropped() -> bool:
    """Whether Laguna's loader leaves out the correction bias of a checkpoint.

    The name that its mapper makes either leads to a parameter of the block, or to the loader of the experts, which is
    run on a stand-in that has the parameter.
    """
    import torch
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models.laguna import LagunaModel

    mapped = LagunaModel.hf_to_vllm_mapper.map_name(LAGUNA_BIAS)
    if mapped is None:
        return True
    _, below_experts, rest = mapped.partition(".experts.")
    if not below_experts:
        return False
    bias = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    experts = SimpleNamespace(
        layer_name="layers.0.mlp.experts", e_score_correction_bias=bias, get_expert_mapping=lambda **options: []
    )
    return not list(RoutedExperts.load_weights(experts, [(rest, torch.ones(2))]))


def command_fails() -> bool:
    """Whether `vllm --version` fails, run as the module behind the command in a process of its own."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "--version"]
    done = subprocess.run(command, capture_output=True, timeout=COMMAND_SECONDS, check=False)
    return done.returncode != 0


def expert_map_is_ignored() -> bool:
    """Whether the CPU kernel never reads the map of an expert-parallel rank."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    read = {instruction.argval for instruction in dis.get_instructions(CPUUnquantizedExperts.apply)}
    return "expert_map" not in read


def rows_are_not_gathered() -> bool:
    """Whether data-parallel ranks on a CPU cannot tell each other their rows."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    return "all_gatherv" not in vars(CpuCommunicator)


def quantised_experts_need_amx() -> bool:
    """Whether the kernels for quantised experts refuse this CPU."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    kernels = (cpu_moe.CPUExpertsFp8, cpu_moe.CPUExpertsInt4, cpu_moe.CPUExpertsMxfp4)
    return not any(kernel._supports_current_device() for kernel in kernels)


def latent_attention_refuses_float32() -> bool:
    """Whether the backend that this CPU gets for latent attention computes in no float32."""
    import torch
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    wanted = SimpleNamespace(use_sparse=False, use_mla=True, dtype=torch.float32)
    backend = resolve_obj_by_qualname(current_platform.get_attn_backend_cls(None, wanted))
    return torch.float32 not in backend.supported_dtypes
