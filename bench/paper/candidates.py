"""Criteria that might beat REAP at the same size; each sees its calibration sample alone.

REAP prices an expert by what it adds, g|f|. But a token whose expert is gone is not left alone: the next expert in line
takes the place, and the gates are renormalised. With y the layer's output and y_j its output without expert j, the loss
of a token is |y - y_j|^2. The candidates:

- `reroute`: the sum of |y - y_j|^2 over the tokens routed to j; `reroute mean`: its mean.
- `greedy`: the same sum, but experts leave one after the other, and each time the sum of |y - y_S|^2 over all tokens is
  computed anew for the set S that is left. `greedy relative` divides each token's error by its |y|^2.
- `swaps`: from the best of reap, greedy and greedy by domain, exchanges of a kept for a dropped expert that lower the
  divergence (KL) of the whole model from the base on part of the calibration sample, through masks.
- `reap by domain`: the largest of the domains' REAP scores, each over the domain's highest score of the layer.
- `weighted ean by domain`: the sum over the domains of the expert's share of the domain's sum of g|f|.
- `greedy by domain`: `greedy` with each domain's errors over its mean |y|^2.
- `reap global`, `greedy global`: budgets that differ by layer, by one threshold over all; stock vLLM does
  not serve them.

Axes: E experts, N tokens, H hidden.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.paper.collect import Collected, LayerTokens
from bench.paper.measure import HeldOut
from bench.paper.network import Experts, Network
from bench.paper.traffic import Request
from reap_serve.statistics.saliency import mix_slices, saliency

CANDIDATES = (
    "reroute",
    "reroute mean",
    "greedy",
    "greedy relative",
    "reap by domain",
    "weighted ean by domain",
    "greedy by domain",
    "swaps",
    "reap global",
    "greedy global",
)
MAX_TOKENS = 3072
SWAPS, SWAP_REACH, SEARCH_TOKENS = 60, 8, 1500


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order in which a layer's experts leave, with the loss that each adds; the last two stay.

    Attributes:
        order: Expert ids.
        losses: Sum of squared errors that each removal added, over the layer's mean |y|^2.
        first_E: What the removal of each expert alone would have added.
        routed_E: Tokens routed to each expert.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]
    first_E: Tensor
    routed_E: Tensor


class Candidates:
    """The candidates on one calibration sample; what two of them share is computed once.

    Args:
        network: The model.
        collected: What the sample gave.
        sample: Its requests.
    """

    def __init__(self, network: Network, collected: Collected, sample: Sequence[Request]) -> None:
        self._network = network
        self._collected = collected
        self._sample = sample
        self._everyone = range(network.num_experts)

    def layers(self, name: str, keep: int) -> tuple[Experts, ...]:
        """Each layer's experts by a candidate; the global ones keep `keep` experts a layer on average."""
        return tuple(layer.keep(ids) for layer, ids in zip(self._network.layers, self._kept(name, keep), strict=True))

    def _kept(self, name: str, keep: int) -> list[list[int]]:
        if name == "reap global":
            reap_LE = saliency(mix_slices(self._collected.statistics), "reap")
            return _global(reap_LE, keep, self._network.top_k)
        if name == "greedy global":
            return _greedy_global(self._eliminations["none"], self._network, keep)
        if name == "swaps":
            return self._swapped(keep)
        if name == "reroute":
            return [each.first_E.topk(keep).indices.tolist() for each in self._eliminations["none"]]
        if name == "reroute mean":
            means = [each.first_E / each.routed_E.clamp_min(1) for each in self._eliminations["none"]]
            return [mean_E.topk(keep).indices.tolist() for mean_E in means]
        if name in ("reap", "reap by domain", "weighted ean by domain"):
            return [np.argsort(-score_E, kind="stable")[:keep].tolist() for score_E in self._scores(name)]
        weighting = {"greedy": "none", "greedy relative": "token", "greedy by domain": "domain"}[name]
        return [_left(each, len(self._everyone), keep) for each in self._eliminations[weighting]]

    def _scores(self, name: str) -> np.ndarray:
        statistics = self._collected.statistics
        if name == "reap":
            return saliency(mix_slices(statistics), "reap")
        criterion = "reap" if name == "reap by domain" else "weighted_ean_sum"
        scores_DLE = np.array(
            [saliency(mix_slices(statistics, {domain: 1.0}), criterion) for domain in statistics.header.slices]
        )
        if criterion == "reap":
            return (scores_DLE / scores_DLE.max(axis=2, keepdims=True)).max(axis=0)
        return (scores_DLE / scores_DLE.sum(axis=2, keepdims=True)).sum(axis=0)

    @functools.cached_property
    def _eliminations(self) -> dict[str, list[Elimination]]:
        return {
            weighting: [
                eliminate(layer, tokens, self._network.top_k, weighting)
                for layer, tokens in zip(self._network.layers, self._collected.tokens, strict=True)
            ]
            for weighting in ("none", "token", "domain")
        }

    @functools.cached_property
    def _search(self) -> HeldOut:
        return HeldOut(self._network, _part(self._sample))

    def _divergence(self, kept: Sequence[Sequence[int]]) -> float:
        """Mean over the domains of the mean KL, on the part of the sample."""
        layers = [layer.keep(ids) for layer, ids in zip(self._network.layers, kept, strict=True)]
        return float(np.mean([figures.kl for figures in self._search.measure(layers).values()]))

    def _swapped(self, keep: int) -> list[list[int]]:
        """Hill climbing over exchanges of experts that were close to staying or going."""
        random = np.random.default_rng(0)
        cut = len(self._everyone) - keep
        starts = [self._kept(name, keep) for name in ("reap", "greedy", "greedy by domain")]
        divergences = [self._divergence(each) for each in starts]
        kept, best = starts[int(np.argmin(divergences))], min(divergences)
        for _ in range(SWAPS):
            number = int(random.integers(len(kept)))
            near = self._eliminations["domain"][number].order[max(0, cut - SWAP_REACH) : cut + SWAP_REACH]
            leave = [expert for expert in near if expert in kept[number]]
            enter = [expert for expert in near if expert not in kept[number]]
            if not leave or not enter:
                continue
            tried = list(kept)
            tried[number] = sorted({*kept[number], int(random.choice(enter))} - {int(random.choice(leave))})
            divergence = self._divergence(tried)
            if divergence < best:
                best, kept = divergence, tried
        return kept


@torch.no_grad()
def eliminate(layer: Experts, tokens: LayerTokens, top_k: int, weighting: str) -> Elimination:
    """Removes the expert whose absence adds least, until `top_k` are left; for top-2 routers.

    Args:
        layer: The layer.
        tokens: Its tokens; every n-th is taken where they are more than `MAX_TOKENS`.
        top_k: Experts per token.
        weighting: What a token's squared error is divided by: `none`, its own |y|^2 (`token`), or the mean of its
            domain (`domain`).
    """
    if top_k != 2:
        raise ValueError(f"written for top-2 routers, this one chooses {top_k}")
    step = -(-tokens.x_NH.shape[0] // MAX_TOKENS)
    x_NH, logits_NE = tokens.x_NH[::step], tokens.logits_NE[::step].clone()
    output_ENH = layer.apply_all(x_NH)
    num_experts = logits_NE.shape[1]
    position_N = torch.arange(x_NH.shape[0])

    def mix(logits: Tensor, ids: Tensor) -> Tensor:
        gate = logits.softmax(dim=-1)
        return sum(gate[:, k, None] * output_ENH[ids[:, k], position_N] for k in range(2))  # type: ignore[return-value]

    wanted_NH = mix(*logits_NE.topk(2, dim=-1))
    size_N = wanted_NH.square().sum(-1).clamp_min(1e-12)
    weight_N = torch.ones_like(size_N)
    if weighting == "token":
        weight_N = 1 / size_N
    elif weighting == "domain":
        slice_N = tokens.slice_N[::step]
        total_S = torch.zeros(int(slice_N.max()) + 1).index_add_(0, slice_N, size_N)
        weight_N = 1 / total_S[slice_N]
    scale = float((weight_N * wanted_NH.square().sum(-1)).sum())
    routed_E = torch.bincount(logits_NE.topk(2, dim=-1).indices.reshape(-1), minlength=num_experts)
    order: list[int] = []
    losses: list[float] = []
    first_E: Tensor | None = None
    while len(order) < num_experts - 2:
        value_N3, id_N3 = logits_NE.topk(3, dim=-1)
        now_N = (wanted_NH - mix(value_N3[:, :2], id_N3[:, :2])).square().sum(-1)
        added_E = torch.zeros(num_experts)
        for gone, stay in ((0, [1, 2]), (1, [0, 2])):
            without_N = (wanted_NH - mix(value_N3[:, stay], id_N3[:, stay])).square().sum(-1)
            added_E.index_add_(0, id_N3[:, gone], weight_N * (without_N - now_N))
        if first_E is None:
            first_E = added_E / scale
        added_E[order] = torch.inf
        leaving = int(added_E.argmin())
        order.append(leaving)
        losses.append(float(added_E[leaving]) / scale)
        logits_NE[:, leaving] = -torch.inf
    assert first_E is not None
    return Elimination(tuple(order), tuple(losses), first_E, routed_E)


def _left(elimination: Elimination, num_experts: int, keep: int) -> list[int]:
    return sorted(set(range(num_experts)) - set(elimination.order[: num_experts - keep]))


def _greedy_global(eliminations: Sequence[Elimination], network: Network, keep: int) -> list[list[int]]:
    """Removes from the layer whose next removal adds least, until the average is `keep`."""
    removed = [0] * len(eliminations)
    for _ in range((network.num_experts - keep) * len(eliminations)):
        nexts = [
            each.losses[count] if count < len(each.losses) else float("inf")
            for each, count in zip(eliminations, removed, strict=True)
        ]
        removed[int(np.argmin(nexts))] += 1
    return [
        _left(each, network.num_experts, network.num_experts - count)
        for each, count in zip(eliminations, removed, strict=True)
    ]


def _global(saliency_LE: np.ndarray, keep: int, top_k: int) -> list[list[int]]:
    """The highest of all layers together; each layer keeps at least `top_k`."""
    ranked_LE = saliency_LE.copy()
    for row in ranked_LE:
        row[np.argsort(-row, kind="stable")[:top_k]] = np.inf
    threshold = np.sort(ranked_LE, axis=None)[::-1][keep * len(ranked_LE) - 1]
    return [np.flatnonzero(row >= threshold).tolist() for row in ranked_LE]


def _part(sample: Sequence[Request]) -> list[Request]:
    """Requests of a sample of about `SEARCH_TOKENS` tokens, the domains in turn."""
    by_domain: dict[str, list[int]] = {}
    for index in np.random.default_rng(0).permutation(len(sample)):
        by_domain.setdefault(sample[index].domain, []).append(int(index))
    order = [index for turn in itertools.zip_longest(*by_domain.values()) for index in turn if index is not None]
    part: list[Request] = []
    for index in order:
        if sum(len(each.token_ids) for each in part) < SEARCH_TOKENS:
            part.append(sample[index])
    return part
