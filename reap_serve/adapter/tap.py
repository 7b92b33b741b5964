"""Where a recorder meets a layer: before its fused kernel, in its place, or behind it.

In eager mode Python runs at every step. In vLLM's compiled mode on the CPU, Dynamo traces through the layer and Python
runs once, so the tap before a kernel is a custom operator: opaque, with a declared mutation that keeps it in the graph.
A tap behind a kernel is not in the graph at all: see `tap_kernel`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reap_serve.adapter import layer_view, replicas
from reap_serve.adapter.operators import define
from reap_serve.record.recorder import Moment
from reap_serve.record.tap import Tap

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


def _tap_op(
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
    tap = layer_view.current_layer(layer_name).reap_experts.reap_tap
    if tap is not None:
        tap.record(x_TH, gate_TK, expert_ids_TK)


define("tap(Tensor(a!) anchor, Tensor x, Tensor gate, Tensor expert_ids, str layer_name) -> ()", _tap_op)


def show(experts: RoutedExperts, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
    """Shows a layer's routed tokens to its tap: by the operator in a compiled graph, else without its dispatch."""
    if torch.compiler.is_compiling():
        torch.ops.reap_serve.tap(experts.reap_anchor, x_TH, gate_TK, expert_ids_TK, experts.reap_layer_name)
    elif experts.reap_tap is not None:
        experts.reap_tap.record(x_TH, gate_TK, expert_ids_TK)


def add_tap(layer: MoERunner) -> None:
    """Makes room for a tap in a layer that was just built; it does nothing until `connect` sets one."""
    experts = layer.routed_experts
    experts.__class__ = _tapped_class(type(experts))
    # Found without `torch.nn.Module.__getattr__`, at every step.
    vars(layer)["reap_experts"] = experts
    experts.reap_tap = None
    experts.reap_moment = Moment.BEFORE
    experts.reap_layer_name = layer.layer_name
    experts.register_buffer("reap_anchor", torch.zeros(1, dtype=torch.float32), persistent=False)


def is_tapped(module: torch.nn.Module) -> bool:
    """Whether a layer, or its routed experts, has room for a tap."""
    return "reap_experts" in vars(module) or plain_class(module) is not type(module)


def plain_class(experts: torch.nn.Module) -> Any:
    """The class that vLLM gave to routed experts."""
    return getattr(type(experts), "reap_plain_class", type(experts))


class _LogicalTap:
    """Shows a recorder the experts that were meant, where EPLB has chosen replicas of them."""

    def __init__(self, layer: MoERunner, tap: Tap) -> None:
        self._layer = layer
        self._tap = tap

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, replica_ids_TK: torch.Tensor) -> torch.Tensor | None:
        """See `record.tap.Tap`."""
        return self._tap.record(x_TH, gate_TK, replicas.logical_ids(self._layer, replica_ids_TK))


def connect(layer: MoERunner, tap: Tap) -> None:
    """Sets the tap of a layer whose weights are in place, and which nothing has compiled yet."""
    experts = layer.routed_experts
    experts.reap_tap = _LogicalTap(layer, tap) if replicas.moves_experts(layer) else tap
    experts.reap_moment = tap.moment
    if tap.moment is Moment.INSTEAD:
        # The layer's Python has to run at every step: through vLLM's opaque operator, as on GPUs.
        layer._forward_entry = layer_view.opaque_forward(layer)
    elif tap.moment is Moment.AFTER:
        # `tap_kernel` shows it the calls.
        experts.__class__ = plain_class(experts)


def _tapped_class(plain: Any) -> type:
    def forward_modular(
        self: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        if self.reap_moment is Moment.INSTEAD:
            tap = self.reap_tap
            output = None if tap is None else tap.record(x, topk_weights, topk_ids)
            if output is not None:
                layer_view.run_overlapped_shared_experts(shared_experts, shared_experts_input)
                return output
        else:
            show(self, x, topk_weights, topk_ids)
        return plain.forward_modular(self, x, topk_weights, topk_ids, shared_experts, shared_experts_input)

    members = {"forward_modular": forward_modular, "reap_plain_class": plain}
    return type(f"Tapped{plain.__name__}", (plain,), members)
