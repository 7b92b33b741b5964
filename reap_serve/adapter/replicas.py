"""Experts that EPLB serves by replicas and moves: which replicas are whose, as they stand now.

Axes: E experts, R replicas of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


def moves_experts(layer: MoERunner) -> bool:
    """Whether EPLB serves the layer's experts by replicas and moves them."""
    return bool(layer.moe_config.moe_parallel_config.enable_eplb)


def first_replicas(layer: MoERunner, expert_ids: torch.Tensor) -> torch.Tensor:
    """A replica of each expert, as they stand now."""
    replicas_ER = layer.router.eplb_state.logical_to_physical_map
    return cast(torch.Tensor, replicas_ER[expert_ids.clamp(min=0).long(), 0].to(expert_ids.dtype))


def logical_ids(layer: MoERunner, replica_ids: torch.Tensor) -> torch.Tensor:
    """Ids of the experts whose replicas were chosen in the running forward pass."""
    replicas_ER = layer.router.eplb_state.logical_to_physical_map
    experts_ER = torch.arange(replicas_ER.shape[0], device=replicas_ER.device).unsqueeze(1).expand_as(replicas_ER)
    # Missing replicas are -1: they write behind the last one.
    num_replicas = layer.moe_config.num_experts
    expert_of = torch.full((num_replicas + 1,), -1, dtype=replica_ids.dtype, device=replica_ids.device)
    index = torch.where(replicas_ER < 0, num_replicas, replicas_ER)
    expert_of.scatter_(0, index.reshape(-1).long(), experts_ER.reshape(-1).to(expert_of.dtype))
    return torch.where(replica_ids < 0, -1, expert_of[replica_ids.clamp(min=0).long()])
