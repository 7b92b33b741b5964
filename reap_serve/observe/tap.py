"""Where a recorder meets a layer: between the router and the fused kernel.

In eager mode Python runs at every step. In vLLM's compiled mode on the CPU, Dynamo traces through the layer and Python
runs once, so the tap is a custom operator: opaque, with a declared mutation that keeps it in the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from reap_serve.observe import seams

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


class LayerTap(Protocol):
    """What sees every call of a layer."""

    def observe(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor | None:
        """Sees the routed tokens; returns the layer's output if it computed it. Never raises."""


@torch.library.custom_op("reap_serve::tap", mutates_args=("anchor",))
def tap_op(
    anchor: torch.Tensor, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor, layer_name: str
) -> None:
    """Shows a layer's routed tokens to its tap.

    Args:
        anchor: A buffer of the layer that the operator claims to write: without it the compiler would drop the call.
        x_TH: Input of the experts.
        gate_TK: Gate weights.
        expert_ids_TK: Chosen experts.
        layer_name: Finds the layer in the running forward pass.
    """
    tap = seams.current_layer(layer_name).routed_experts.reap_tap
    if tap is not None:
        tap.observe(x_TH, gate_TK, expert_ids_TK)


def show(experts: RoutedExperts, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
    """Shows a layer's routed tokens to its tap: by the operator in a compiled graph, else without its dispatch."""
    if torch.compiler.is_compiling():
        torch.ops.reap_serve.tap(experts.reap_anchor, x_TH, gate_TK, expert_ids_TK, experts.reap_layer_name)
    elif experts.reap_tap is not None:
        experts.reap_tap.observe(x_TH, gate_TK, expert_ids_TK)


def add_tap(layer: MoERunner, *, replaces_output: bool) -> None:
    """Makes room for a tap in a layer; it does nothing until `routed_experts.reap_tap` is set.

    Args:
        layer: The layer, just built.
        replaces_output: The tap computes the layer's output, so that the layer's Python has to run at every step: the
            layer is called through vLLM's opaque `moe_forward` operator, as on GPUs.
    """
    experts = layer.routed_experts
    experts.__class__ = _tapped_class(type(experts), replaces_output)
    experts.reap_tap = None
    experts.reap_layer_name = layer.layer_name
    experts.register_buffer("reap_anchor", torch.zeros(1, dtype=torch.float32), persistent=False)
    if replaces_output:
        entries = torch.ops.vllm
        layer._forward_entry = entries.moe_forward if layer._shared_experts is None else entries.moe_forward_shared


def _tapped_class(plain: Any, replaces_output: bool) -> type:
    def forward_modular(
        self: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        if replaces_output:
            tap = self.reap_tap
            output = None if tap is None else tap.observe(x, topk_weights, topk_ids)
            if output is not None:
                seams.run_overlapped_shared_experts(shared_experts, shared_experts_input)
                return output
        else:
            show(self, x, topk_weights, topk_ids)
        return plain.forward_modular(self, x, topk_weights, topk_ids, shared_experts, shared_experts_input)

    return type(f"Tapped{plain.__name__}", (plain,), {"forward_modular": forward_modular})
