"""The paper's bound on the error of merging a pair of experts, beside the error that is measured.

With g the gates (0 where an expert is not chosen) and r = g_i / (g_i + g_j), over the tokens routed to i or j: the
bound is E[(g_i + g_j)^2] Var[r] E|f_i - f_j|^2 (arXiv 2510.13999, section 3, which takes gates and outputs as
independent). Measured are squared errors of the layer's output where the pair is replaced by the best fixed mixture of
both outputs, by the merged expert, and where the one of lower REAP saliency is dropped and the router chooses anew.

Axes: E experts, N tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.paper.collect import Collected, LayerTokens
from bench.paper.methods import merged_layer
from bench.paper.network import Experts, Network
from reap_serve.compare.subspace import MergeBound
from reap_serve.merge.grouping import Group, group_layers, method_named
from reap_serve.merge.signature import layer_signatures

MIN_TOKENS = 20


def merge_bounds(network: Network, collected: Collected, method: str, keep: int) -> Iterator[MergeBound]:
    """The bound of every pair that a method merges into an expert of two members."""
    signatures = layer_signatures(collected.statistics)
    for index, groups in enumerate(group_layers(signatures, method, keep)):
        for group in groups:
            if len(group.members) == 2:
                found = _bound(
                    network.layers[index],
                    collected.tokens[index],
                    group,
                    method_named(method).aligns,
                    signatures[index].reap_E.tolist(),
                )
                if found is not None:
                    yield MergeBound(layer=index, experts=(group.members[0], group.members[1]), method=method, **found)


@torch.no_grad()
def _bound(
    layer: Experts, tokens: LayerTokens, group: Group, aligns: bool, saliency: list[float]
) -> dict[str, float] | None:
    first, second = group.members
    value_NK, id_NK = tokens.logits_NE.topk(2, dim=-1)
    gate_NK = value_NK.softmax(dim=-1)
    gates = [torch.where(id_NK == expert, gate_NK, 0.0).sum(dim=-1) for expert in (first, second)]
    used = (gates[0] + gates[1]) > 0
    if int(used.sum()) < MIN_TOKENS:
        return None
    x_NH, g_i, g_j = tokens.x_NH[used], gates[0][used], gates[1][used]
    f_i, f_j = layer.apply(first, x_NH), layer.apply(second, x_NH)
    merged = merged_layer(layer, [group], aligns, whole_router=False).apply(0, x_NH)
    both, distance = g_i + g_j, (f_i - f_j).square().sum(-1)
    ratio = g_i / both
    weight = both.square() * distance
    best = (weight * ratio).sum() / weight.sum().clamp_min(1e-30)
    gone = first if saliency[first] < saliency[second] else second
    return {
        "bound": float(both.square().mean() * ratio.var(unbiased=False) * distance.mean()),
        "ideal": float((weight * (ratio - best).square()).mean()),
        "measured": float((g_i[:, None] * f_i + g_j[:, None] * f_j - both[:, None] * merged).square().sum(-1).mean()),
        "pruned": float(_dropped(layer, x_NH, tokens.logits_NE[used], gone).mean()),
    }


def _dropped(layer: Experts, x_NH: Tensor, logits_NE: Tensor, gone: int) -> Tensor:
    """Squared error of the layer's output without an expert, by token."""
    remaining = logits_NE.clone()
    remaining[:, gone] = -torch.inf
    return (_mix(layer, x_NH, logits_NE) - _mix(layer, x_NH, remaining)).square().sum(-1)


def _mix(layer: Experts, x_NH: Tensor, logits_NE: Tensor) -> Tensor:
    value_NK, id_NK = logits_NE.topk(2, dim=-1)
    output_ENH = layer.apply_all(x_NH)
    position_N = torch.arange(x_NH.shape[0])
    gate_NK = value_NK.softmax(dim=-1)
    total: Tensor = sum(gate_NK[:, k, None] * output_ENH[id_NK[:, k], position_N] for k in range(2))  # type: ignore[assignment]
    return total
