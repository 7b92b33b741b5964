"""A layer's router: its computation, whole or over some experts, and where hooks see and change its choice.

A hook stands behind the router's own computation of gate weights and expert ids.

In eager mode, and inside vLLM's opaque `moe_forward` operator, Python runs at every step and the hook is called as it
is. In vLLM's compiled mode on the CPU, Dynamo traces through the router, so the call becomes an operator that declares
what it writes. In both cases the router has computed its plain choice first: where the hook does nothing, the result is
bit-identical. A router without a hook costs nothing in eager mode, and in compiled mode a call of a function that does
nothing (`stand_in.SkippedRouting`).

Axes: T tokens, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import torch

from reap_serve.adapter import layer_view
from reap_serve.adapter.operators import define
from reap_serve.adapter.releases.check import attribute_or_none
from reap_serve.adapter.stand_in import routing_stand_in

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


class RoutingHook(Protocol):
    """What sees every choice of a router, and may change it."""

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor
    ) -> None:
        """Sees one call of the router; writes other weights and ids in place where rows are masked."""


class _InTurn:
    """Two hooks, of which the second sees what the first has left."""

    def __init__(self, first: RoutingHook, second: RoutingHook) -> None:
        self._first, self._second = first, second

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor
    ) -> None:
        self._first.routed(x_TH, logits_TE, weights_TK, expert_ids_TK)
        self._second.routed(x_TH, logits_TE, weights_TK, expert_ids_TK)


def _mask_routing_op(
    weights_TK: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    layer_name: str,
) -> None:
    """Shows a router's choice to the layer's hook, which may overwrite it."""
    hook = layer_view.current_layer(layer_name).router.reap_routing
    if hook is not None:
        hook.routed(x_TH, logits_TE, weights_TK, expert_ids_TK)


define(
    "mask_routing(Tensor(a!) weights, Tensor(b!) expert_ids, Tensor x, Tensor logits, str layer_name) -> ()",
    _mask_routing_op,
)


def add_routing_hook(layer: MoERunner, traced: bool) -> None:
    """Makes room for a hook in a layer's router.

    Args:
        layer: It was just built.
        traced: Its Python runs once, while it is compiled: the hook's place has to be there from the start.
    """
    layer.router.reap_routing = None
    layer.router.reap_layer_name = layer.layer_name
    if traced:
        # The graph that is traced next has to find the operator itself.
        routing_stand_in().leave()
        _show_choices(layer.router)


def set_routing_hook(layer: MoERunner, hook: RoutingHook) -> None:
    """Shows every choice of a layer's router to a hook from now on, after the hooks that are there."""
    _show_choices(layer.router)
    before = layer.router.reap_routing
    layer.router.reap_routing = hook if before is None else _InTurn(before, hook)


def _show_choices(router: Any) -> None:
    if not hasattr(type(router), "reap_plain_class"):
        router.__class__ = _hooked_class(type(router))


class Router:
    """A router's own computation, without its hooks.

    Args:
        router: vLLM's.
    """

    def __init__(self, router: Any) -> None:
        self._router = router

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """What it adds to the experts' scores for the choice alone, None when it adds nothing."""
        bias_E = attribute_or_none(self._router, "e_score_correction_bias")
        return None if bias_E is None else bias_E.data

    @property
    def is_custom(self) -> bool:
        """Whether it calls a function of the model, which may hold tensors of its own by expert id."""
        return attribute_or_none(self._router, "custom_routing_function") is not None

    def with_experts(self, num_experts: int, correction_bias_E: torch.Tensor | None) -> Router:
        """The same computation over other experts: over some of them, or over those of the model before pruning."""
        changed = copy.copy(self._router)
        changed.global_num_experts = num_experts
        if correction_bias_E is not None:
            changed.e_score_correction_bias = correction_bias_E
        return Router(changed)

    def route(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, ids_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate weights [T, K] and expert ids [T, K]."""
        plain = getattr(type(self._router), "reap_plain_class", type(self._router))
        weights_TK, ids_TK = plain._compute_routing(self._router, x_TH, logits_TE, ids_dtype)
        return weights_TK, ids_TK


class RoutedLayer:
    """A fused MoE layer, as masks and the shadow router need it.

    Args:
        layer: vLLM's; `add_routing_hook` was called on it.

    Attributes:
        index: Index of the decoder layer.
        num_experts: Experts of the layer, over all ranks.
        router: Its router.
    """

    def __init__(self, layer: MoERunner) -> None:
        self.index: int = layer.layer_id
        self.num_experts: int = layer.moe_config.num_logical_experts
        self.router = Router(layer.router)
        self._layer = layer

    def set_routing_hook(self, hook: RoutingHook) -> None:
        """Shows every choice of the router to a hook from now on, after the hooks that are there."""
        set_routing_hook(self._layer, hook)


def _hooked_class(plain: Any) -> type:
    def compute_routing(
        self: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = plain._compute_routing(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        if torch.compiler.is_compiling():
            torch.ops.reap_serve.mask_routing(weights, ids, hidden_states, router_logits, self.reap_layer_name)
        elif self.reap_routing is not None:
            self.reap_routing.routed(hidden_states, router_logits, weights, ids)
        return weights, ids

    return type(f"Hooked{plain.__name__}", (plain,), {"_compute_routing": compute_routing, "reap_plain_class": plain})
