"""Experts in plain PyTorch that respect `expert_map`, for engines of several expert-parallel ranks on a CPU.

vLLM's own CPU kernel takes the ids of experts for indices of the rank's weights, whatever the map says. This class
takes its place through vLLM's seam for out-of-tree layers, in every process that loads the plugin.

Axes: T tokens, K experts per token, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod


class PlainExperts(FusedMoEExpertsModular):
    """One expert after the other; those of other ranks add nothing."""

    activation_format = staticmethod(CPUUnquantizedExperts.activation_format)
    _supports_current_device = staticmethod(CPUUnquantizedExperts._supports_current_device)
    _supports_quant_scheme = staticmethod(CPUUnquantizedExperts._supports_quant_scheme)
    _supports_parallel_config = staticmethod(CPUUnquantizedExperts._supports_parallel_config)
    finalize_weight_and_reduce_impl = CPUUnquantizedExperts.finalize_weight_and_reduce_impl
    expects_unquantized_inputs = True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return bool(activation == MoEActivation.SILU)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The weights stay as the checkpoint has them."""

    def workspace_shapes(self, M: int, N: int, K: int, *others: Any) -> tuple[tuple[int, ...], ...]:
        """No workspace, and an output of [tokens, hidden]."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes the weighted sum over a token's experts on this rank; rows are computed one by one.

        A matrix product's rounding depends on the number of its rows; here a row's value depends on the row alone, so
        that ranks that see other tokens compute the same bits.
        """
        output.zero_()
        local_TK = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
        for token, slot in (local_TK >= 0).nonzero().tolist():
            expert = int(local_TK[token, slot])
            gate, up = (w1[expert] @ hidden_states[token]).chunk(2)
            row = w2[expert] @ (torch.nn.functional.silu(gate) * up)
            output[token] += row if apply_router_weight_on_input else row * topk_weights[token, slot]


def register() -> None:
    """Puts the class in the place of vLLM's CPU kernels."""

    @UnquantizedFusedMoEMethod.register_oot(name="UnquantizedFusedMoEMethod")
    class PlainMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc, valid-type]
        def __init__(self, moe: Any) -> None:
            super().__init__(moe)
            self.experts_cls = PlainExperts
