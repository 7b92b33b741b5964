"""How differently the domains use the experts.

Axes: D domains, L layers, E experts.
"""

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

COVERED_FRACTION = 0.8


def shares(counts_DLE: Array) -> Array:
    """Gives each expert's share of a domain's routed tokens in a layer; a layer's shares add up to 1."""
    shares_DLE: Array = counts_DLE / counts_DLE.sum(-1, keepdims=True)
    return shares_DLE


def entropy_bits(shares_E: Array) -> Array:
    """Gives the Shannon entropy over the last axis, in bits."""
    logarithms = np.log2(np.where(shares_E > 0, shares_E, 1.0))
    entropy: Array = -(shares_E * logarithms).sum(-1)
    return entropy


def divergence_bits(counts_DLE: Array) -> float:
    """Gives the Jensen-Shannon divergence of the domains with equal weights, in bits, as the mean over the layers.

    H(mean of the shares) - mean of H(shares): 0 if all domains use the experts alike, log2(D) if no two share one.
    Source: Lin, "Divergence measures based on the Shannon entropy" (1991).
    """
    shares_DLE = shares(counts_DLE)
    return float((entropy_bits(shares_DLE.mean(0)) - entropy_bits(shares_DLE).mean(0)).mean())


def num_covering(counts_DLE: Array) -> Array:
    """Gives ``[D, L]``: how many experts, most used first, take ``COVERED_FRACTION`` of the routed tokens."""
    descending = -np.sort(-shares(counts_DLE), axis=-1)
    num_before_DL: Array = (descending.cumsum(-1) < COVERED_FRACTION).sum(-1)
    return num_before_DL + 1


def num_shared(counts_DLE: Array, first: int, second: int) -> float:
    """Gives how many of the most used half of the experts two domains have in common, as the mean over the layers."""
    half = counts_DLE.shape[-1] // 2
    top = np.argsort(-counts_DLE, axis=-1, kind="stable")[..., :half]
    return float(np.mean([len(set(a) & set(b)) for a, b in zip(top[first], top[second], strict=True)]))
