"""Which experts are merged into which, by the published methods.

A group has a dominant expert, whose id and router row it keeps, and members with weights that add up to 1. The papers
keep the router whole and lead every row of it to its group's merged expert; stock vLLM has one row for each expert, so
that a served checkpoint keeps the dominant's row alone.

Axes: E experts, H hidden dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from reap_serve.errors import RequestError
from reap_serve.merge.signature import LayerSignature, require_sums
from reap_serve.statistics.record import Floats

# REAM's C: no dominant expert takes in more than this, itself included.
REAM_GROUP_SIZE = 16


@dataclass(frozen=True, slots=True)
class Group:
    """Experts that become one.

    Attributes:
        dominant: The member whose id and router row stay.
        members: Ids, ascending.
        weights: Of each member in the average; they add up to 1.
    """

    dominant: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


Grouping = Callable[[LayerSignature, int], tuple[Group, ...]]


@dataclass(frozen=True, slots=True)
class Method:
    """A published way to merge.

    Attributes:
        group: Groups of one layer, ascending by dominant expert.
        aligns: Whether the members' hidden units are permuted to fit the dominant's before they are averaged.
        needs_outputs: Whether it takes `output_sum`.
        needs_logits: Whether it takes `logit_gram`.
    """

    group: Grouping
    aligns: bool
    needs_outputs: bool
    needs_logits: bool


def m_smoe(layer: LayerSignature, num_groups: int) -> tuple[Group, ...]:
    """M-SMoE (arXiv 2310.01334): the most used experts are dominant, the others join the one whose router logits are
    most like theirs (cosine over tokens), weights are the experts' frequencies.

    The paper shares one budget over all layers; here each layer has the same, which stock vLLM takes.
    """
    assert layer.logit_cosine_EE is not None
    dominant = _largest(layer.token_count_E, num_groups)
    nearest_E = dominant[np.argmax(layer.logit_cosine_EE[:, dominant], axis=1)]
    nearest_E[dominant] = dominant
    return _groups(nearest_E, layer.token_count_E)


def hc_smoe(layer: LayerSignature, num_groups: int) -> tuple[Group, ...]:
    """HC-SMoE (arXiv 2410.08589): agglomerative clustering of mean expert outputs, average linkage of Euclidean
    distances, weights are the experts' frequencies.

    The paper averages outputs over all tokens; here over those routed to the expert. The most used member is dominant.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    assert layer.mean_output_EH is not None
    label_E = cut_tree(linkage(layer.mean_output_EH, "average"), n_clusters=num_groups)[:, 0]
    nearest_E = np.empty(label_E.shape[0], np.int64)
    for label in np.unique(label_E):
        members = np.flatnonzero(label_E == label)
        nearest_E[members] = members[_largest(layer.token_count_E[members], 1)[0]]
    return _groups(nearest_E, layer.token_count_E)


def ream(layer: LayerSignature, num_groups: int) -> tuple[Group, ...]:
    """REAM (arXiv 2604.04356): the experts of highest REAP saliency are dominant and in this order take in the nearest
    free ones, at most `REAM_GROUP_SIZE` together; weights are the saliencies.

    Nearness is the mean of two cosines, of mean outputs and of router logits. The paper weights outputs with the gate
    over all tokens, and measures each layer anew behind the merged ones before it; here outputs are those of routed
    tokens and every layer is measured in the model as it was.
    """
    assert layer.mean_output_EH is not None
    assert layer.logit_cosine_EE is not None
    num_experts = layer.token_count_E.shape[0]
    length_E1 = np.linalg.norm(layer.mean_output_EH, axis=1, keepdims=True)
    unit_EH = np.divide(layer.mean_output_EH, length_E1, out=np.zeros_like(layer.mean_output_EH), where=length_E1 > 0)
    nearness_EE = (unit_EH @ unit_EH.T + layer.logit_cosine_EE) / 2
    dominant = _largest(layer.reap_E, num_groups)
    if num_groups * REAM_GROUP_SIZE < num_experts:
        raise RequestError(
            f"REAM groups hold at most {REAM_GROUP_SIZE}: {num_groups} of them do not take {num_experts} experts",
            f"keep at least {-(-num_experts // REAM_GROUP_SIZE)} experts",
        )
    nearest_E = np.full(num_experts, -1, np.int64)
    nearest_E[dominant] = dominant
    for centre in dominant:
        free = np.flatnonzero(nearest_E < 0)
        order = free[np.argsort(-nearness_EE[centre, free], kind="stable")]
        nearest_E[order[: REAM_GROUP_SIZE - 1]] = centre
    return _groups(nearest_E, layer.reap_E)


METHODS: Mapping[str, Method] = {
    "m-smoe": Method(m_smoe, aligns=True, needs_outputs=False, needs_logits=True),
    "hc-smoe": Method(hc_smoe, aligns=False, needs_outputs=True, needs_logits=False),
    "ream": Method(ream, aligns=True, needs_outputs=True, needs_logits=True),
}


def method_named(name: str) -> Method:
    """The method of a name.

    Raises:
        RequestError: There is none.
    """
    if name not in METHODS:
        raise RequestError(f"there is no merging method {name}", f"use one of: {', '.join(METHODS)}")
    return METHODS[name]


def group_layers(
    signatures: tuple[LayerSignature, ...], method_name: str, num_groups: int
) -> tuple[tuple[Group, ...], ...]:
    """The groups of every layer.

    Raises:
        RequestError: There is no such method, the statistics lack what it takes, or the count is impossible.
    """
    method = method_named(method_name)
    num_experts = signatures[0].token_count_E.shape[0]
    if not 1 <= num_groups <= num_experts:
        raise RequestError(f"{num_groups} groups of {num_experts} experts cannot be made", "keep between 1 and all")
    require_sums(signatures, method_name, method.needs_outputs, method.needs_logits)
    return tuple(method.group(layer, num_groups) for layer in signatures)


def _largest(values: Floats, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Positions of the largest values, descending; equal ones in ascending order of position."""
    return np.argsort(-values, kind="stable")[:count].astype(np.int64)


def _groups(dominant_E: np.ndarray[tuple[int], np.dtype[np.int64]], importance_E: Floats) -> tuple[Group, ...]:
    """The groups of experts with the same dominant one; members that all have importance 0 weigh the same."""
    found = []
    for dominant in np.unique(dominant_E).tolist():
        members = np.flatnonzero(dominant_E == dominant)
        share = importance_E[members]
        share = share / share.sum() if share.sum() > 0 else np.full(len(members), 1 / len(members))
        found.append(Group(dominant, tuple(members.tolist()), tuple(share.tolist())))
    return tuple(found)
