"""The methods of the table: statistics of a calibration sample to a changed model, in memory.

Criteria and merging are the product's own (`reap_serve.statistics.saliency`, `reap_serve.merge`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bench.paper.network import Experts, Network
from reap_serve.merge.average import merge_group
from reap_serve.merge.grouping import Group, group_layers, method_named
from reap_serve.merge.signature import layer_signatures
from reap_serve.statistics.record import Statistics
from reap_serve.statistics.saliency import mix_slices, saliency

PRUNING = ("reap", "frequency", "ean_sum", "weighted_ean_sum", "msan", "asq", "random")
MERGING = ("m-smoe", "hc-smoe", "ream")
# The papers' form of merging: the whole router, whose rows lead to merged experts. Stock vLLM cannot serve it.
WHOLE_ROUTER = " whole router"
METHODS = (*PRUNING, *MERGING, *(f"{name}{WHOLE_ROUTER}" for name in ("m-smoe", "hc-smoe")))


def changed_layers(network: Network, method: str, statistics: Statistics, keep: int, seed: int) -> tuple[Experts, ...]:
    """Each layer's experts after a method left `keep` of them.

    Args:
        network: The model.
        method: Name in `METHODS`.
        statistics: Of the calibration sample.
        keep: Experts of each layer.
        seed: Of `random`.
    """
    if method in PRUNING:
        saliency_LE = saliency(mix_slices(statistics), method, seed)
        return tuple(
            layer.keep(np.argsort(-saliency_E, kind="stable")[:keep].tolist())
            for layer, saliency_E in zip(network.layers, saliency_LE, strict=True)
        )
    name = method.removesuffix(WHOLE_ROUTER)
    groups = group_layers(layer_signatures(statistics), name, keep)
    return tuple(
        merged_layer(layer, each, method_named(name).aligns, whole_router=method.endswith(WHOLE_ROUTER))
        for layer, each in zip(network.layers, groups, strict=True)
    )


def merged_layer(layer: Experts, groups: Sequence[Group], aligns: bool, *, whole_router: bool) -> Experts:
    """A layer with one expert for each group."""
    merged = [
        merge_group(_weights(layer, group), group.weights, group.members.index(group.dominant), aligns)
        for group in groups
    ]
    rows = torch.tensor([group.dominant for group in groups])
    expert_of_row = torch.arange(len(groups))
    if whole_router:
        expert_of_row = torch.empty(layer.router_RH.shape[0], dtype=torch.int64)
        for number, group in enumerate(groups):
            expert_of_row[list(group.members)] = number
    return Experts(
        layer.router_RH if whole_router else layer.router_RH[rows],
        expert_of_row,
        *(
            torch.stack([torch.from_numpy(weights[f"{name}_proj.weight"]) for weights in merged])
            for name in ("gate", "up", "down")
        ),
    )


def _weights(layer: Experts, group: Group) -> list[dict[str, np.ndarray]]:
    return [
        {
            "gate_proj.weight": layer.gate_CIH[member].numpy(),
            "up_proj.weight": layer.up_CIH[member].numpy(),
            "down_proj.weight": layer.down_CHI[member].numpy(),
        }
        for member in group.members
    ]
