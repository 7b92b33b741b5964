"""vLLM's CPU routers of every scheme, for a full model or, from sliced tensors, for a pruned one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

E, H, K = 12, 8, 3
KEPT = (0, 2, 3, 5, 6, 7, 9, 11)
# Two of each group of three, for routers with four groups.
KEPT_IN_GROUPS = (0, 2, 3, 4, 7, 8, 9, 11)
# Plans by name, with experts among which every router here can choose.
PLANS: dict[str, dict[int, tuple[int, ...]]] = {
    "some": {0: KEPT_IN_GROUPS},
    "all": {0: tuple(range(E))},
    "others": {0: (1, 2, 3, 5, 6, 7, 9, 10)},
    "late": {0: (0, 1, 4, 5, 7, 8, 10, 11)},
}


@dataclass(frozen=True)
class RoutingCase:
    """A scheme: its router for some experts and their bias, and which experts a plan keeps."""

    name: str
    make: Callable[[int, torch.Tensor], Any]
    kept: tuple[int, ...]


def _router(**arguments: Any) -> Callable[[int, torch.Tensor], Any]:
    def make(num_experts: int, bias_E: torch.Tensor) -> Any:
        from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

        chosen = dict(arguments)
        if chosen.pop("biased", False):
            chosen["e_score_correction_bias"] = bias_E
        return CPURouter(top_k=K, global_num_experts=num_experts, **chosen)

    return make


def _sigmoid_routing(num_experts: int, bias_E: torch.Tensor) -> Any:
    """As Llama 4: the sigmoid of the largest logits."""

    def routing(hidden_states: Any, gating_output: torch.Tensor, topk: int, renormalize: bool) -> Any:
        logits, ids = torch.topk(gating_output, topk, dim=-1)
        return torch.sigmoid(logits.float()), ids.to(torch.int32)

    return _router(custom_routing_function=routing)(num_experts, bias_E)


def _scaled_routing(num_experts: int, bias_E: torch.Tensor) -> Any:
    """As Gemma 4: a scale by expert id, held by the function."""

    def routing(hidden_states: Any, gating_output: torch.Tensor, topk: int, renormalize: bool) -> Any:
        weights, ids = torch.topk(torch.softmax(gating_output.float(), dim=-1), topk, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * bias_E[ids], ids.to(torch.int32)

    return _router(custom_routing_function=routing)(num_experts, bias_E)


GROUPS = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
CASES = (
    RoutingCase("softmax, renormalised", _router(renormalize=True), KEPT),
    RoutingCase("softmax over all", _router(renormalize=False), KEPT),
    RoutingCase("softmax in groups", _router(**GROUPS, renormalize=False), KEPT_IN_GROUPS),
    RoutingCase(
        "sigmoid in groups with a bias",
        _router(**GROUPS, scoring_func="sigmoid", renormalize=True, routed_scaling_factor=2.5, biased=True),
        KEPT_IN_GROUPS,
    ),
    RoutingCase(
        "sigmoid in one group with a bias",
        _router(
            use_grouped_topk=True,
            num_expert_group=1,
            topk_group=1,
            scoring_func="sigmoid",
            renormalize=True,
            biased=True,
        ),
        KEPT,
    ),
    RoutingCase("a custom function", _sigmoid_routing, KEPT),
    RoutingCase("a custom function with a tensor by expert", _scaled_routing, KEPT),
)


def layer_with(router: Any, num_experts: int = E, index: int = 0) -> Any:
    """The part of vLLM's layer that masks touch."""
    return SimpleNamespace(
        router=router,
        layer_id=index,
        layer_name=f"model.layers.{index}.mlp.experts",
        moe_config=SimpleNamespace(num_logical_experts=num_experts),
    )


def dense(weights_TK: torch.Tensor, ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Gate weight by token and expert, whatever the order of the choice."""
    return torch.zeros(weights_TK.shape[0], num_experts).scatter_add_(1, ids_TK.long(), weights_TK.float())
