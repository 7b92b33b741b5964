"""Which experts to keep when several slices of traffic disagree: maximise the worst slice's retained saliency.

A slice's retained saliency is the mean over the layers of kept saliency / all saliency, so that late layers, whose
activations are larger, do not outweigh the others.

Axes: S slices, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

MAX_STEPS = 40
MAX_SWAPS = 200
SWAP_CANDIDATES = 6
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class MaxMin:
    """Result of `maximise_worst`.

    Attributes:
        kept_LE: The experts to keep.
        worst_fraction: Retained saliency of the worst slice.
        bound_fraction: No choice under the same limits retains more in its worst slice.
    """

    kept_LE: Bools
    worst_fraction: float
    bound_fraction: float


def retained_fractions(share_SLE: Floats, kept_LE: Bools) -> Floats:
    """Retained saliency of each slice [S]: the mean over layers of the kept experts' shares."""
    # einsum and not BLAS, whose threads would change the last bits and wait for each other on a busy machine.
    retained_S: Floats = np.einsum("sle,le->s", share_SLE, kept_LE.astype(np.float64)) / len(kept_LE)
    return retained_S


def maximise_worst(
    share_SLE: Floats, best_for: Callable[[Floats], Bools], start_LE: Bools, movable_LE: Bools, num_groups: int
) -> MaxMin:
    """Keeps the experts that maximise the least retained saliency of the slices.

    For weights w >= 0 of the slices with sum 1, the best choice for the weighted mean of their shares is known
    (`best_for`), and its value bounds the worst slice of every choice from above. Subgradient steps with Polyak's
    length (B. T. Polyak, Introduction to Optimization, 1987, chapter 5) lower that bound, the Lagrangian dual, while
    the best choice met is kept; then swaps of one kept expert for a dropped one of the same layer and group raise its
    worst slice until none does.

    Guarantees: the worst slice retains at least what it does under `start_LE`, and `bound_fraction` is proven, so
    `bound_fraction - worst_fraction` is the most that was left. (The bound needs `best_for` exact: it is for uniform
    counts, and for global ones when the allowed counts are evenly spaced.)

    Args:
        share_SLE: Saliency as a fraction of the layer's sum, per slice.
        best_for: The allowed choice that maximises the sum of a score [L, E].
        start_LE: A choice to begin with.
        movable_LE: Experts that no guard decides.
        num_groups: Groups of the router.
    """
    num_slices = len(share_SLE)
    weight_S = np.full(num_slices, 1 / num_slices)
    kept_LE, worst, bound = start_LE, float(retained_fractions(share_SLE, start_LE).min()), np.inf
    for _ in range(MAX_STEPS):
        candidate_LE = best_for(np.einsum("s,sle->le", weight_S, share_SLE))
        retained_S = retained_fractions(share_SLE, candidate_LE)
        value = float(weight_S @ retained_S)
        bound = min(bound, value)
        if retained_S.min() > worst:
            kept_LE, worst = candidate_LE, float(retained_S.min())
        slope_S = retained_S - retained_S.mean()
        if bound - worst < TOLERANCE or not slope_S.any():
            break
        weight_S = _onto_simplex(weight_S - (value - worst) / float(slope_S @ slope_S) * slope_S)
    kept_LE = _swap(share_SLE, kept_LE, movable_LE, num_groups)
    return MaxMin(kept_LE, float(retained_fractions(share_SLE, kept_LE).min()), bound)


def _onto_simplex(weight_S: Floats) -> Floats:
    """The nearest point with no negative weight and sum 1."""
    descending_S = np.sort(weight_S)[::-1]
    excess_S = (np.cumsum(descending_S) - 1) / np.arange(1, len(weight_S) + 1)
    shift = excess_S[np.flatnonzero(descending_S > excess_S)[-1]]
    projected_S: Floats = np.maximum(weight_S - shift, 0)
    return projected_S


def _swap(share_SLE: Floats, kept_LE: Bools, movable_LE: Bools, num_groups: int) -> Bools:
    """Exchanges experts within a layer and group while the worst slice gains.

    Only the few most promising experts of each layer for the worst slice are tried, which bounds the work.
    """
    num_layers, num_experts = kept_LE.shape
    kept_LE = kept_LE.copy()
    num_candidates = min(SWAP_CANDIDATES, num_experts)
    layer_L11 = np.arange(num_layers)[:, np.newaxis, np.newaxis]
    group_size = num_experts // num_groups
    for _ in range(MAX_SWAPS):
        retained_S = retained_fractions(share_SLE, kept_LE)
        worst_LE = share_SLE[retained_S.argmin()]
        leave_LC = _smallest(np.where(kept_LE & movable_LE, worst_LE, np.inf), num_candidates)
        enter_LC = _smallest(np.where(~kept_LE & movable_LE, -worst_LE, np.inf), num_candidates)
        leave_LC1, enter_L1C = leave_LC[:, :, np.newaxis], enter_LC[:, np.newaxis, :]
        gain_SLCC = (share_SLE[:, layer_L11, enter_L1C] - share_SLE[:, layer_L11, leave_LC1]) / num_layers
        least_LCC = (retained_S[:, np.newaxis, np.newaxis, np.newaxis] + gain_SLCC).min(axis=0)
        allowed_LCC = (
            (kept_LE & movable_LE)[layer_L11, leave_LC1]
            & (~kept_LE & movable_LE)[layer_L11, enter_L1C]
            & (leave_LC1 // group_size == enter_L1C // group_size)
        )
        least_LCC = np.where(allowed_LCC, least_LCC, -np.inf)
        layer, leave, enter = np.unravel_index(int(least_LCC.argmax()), least_LCC.shape)
        if least_LCC[layer, leave, enter] <= retained_S.min() + TOLERANCE:
            break
        kept_LE[layer, leave_LC[layer, leave]] = False
        kept_LE[layer, enter_LC[layer, enter]] = True
    return kept_LE


def _smallest(value_LE: Floats, count: int) -> Ints:
    smallest: Ints = np.argsort(value_LE, axis=1, kind="stable")[:, :count]
    return smallest
