"""How many experts each layer keeps.

Axes: L layers, E experts, C chunks between consecutive allowed counts.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from reap_serve.errors import PlanError
from reap_serve.plan.limits import CountLimits
from reap_serve.plan.request import Size
from reap_serve.plan.sizes import CheckpointBytes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def uniform_count(size: Size, limits: CountLimits, checkpoint: CheckpointBytes | None) -> int:
    """The count that every layer keeps.

    `keep_experts` is taken as it is. `keep_fraction` F gives floor(F * E + 1/2), and where a divisibility limit forbids
    that, the nearest allowed count (the larger of two). `target_bytes` gives the largest allowed count that fits.

    Raises:
        PlanError: The count breaks a limit, or nothing fits.
    """
    if size.target_bytes is not None:
        known = require_bytes(checkpoint)
        fitting = [count for count in limits.allowed if known.at_uniform(count) <= size.target_bytes]
        if not fitting:
            smallest = known.at_uniform(limits.smallest)
            raise PlanError(
                f"{size} is below the {smallest} bytes of the smallest count that can be served, {limits.smallest} of "
                f"{limits.num_experts} experts per layer",
                f"give --target-bytes {smallest} or more, or a smaller or more compressed model",
            )
        return fitting[-1]
    if size.keep_experts is not None:
        limits.require(size.keep_experts, str(size))
        return size.keep_experts
    assert size.keep_fraction is not None
    count = rounded_count(size.keep_fraction, limits.num_experts)
    if count < limits.smallest:
        limits.require(count, str(size))
    return limits.nearest(count)


def rounded_count(fraction: float, num_experts: int) -> int:
    """fraction * num_experts, halves rounded up."""
    return math.floor(fraction * num_experts + 0.5)


def require_bytes(checkpoint: CheckpointBytes | None) -> CheckpointBytes:
    """The sizes of the checkpoint, which only its headers tell.

    Raises:
        PlanError: The model was not given.
    """
    if checkpoint is None:
        raise PlanError("--target-bytes needs the sizes of the model's tensors", "add --model MODEL")
    return checkpoint


def global_counts(
    size: Size,
    limits: CountLimits,
    share_LE: Floats,
    order_LE: Ints,
    guarded_L: Ints,
    checkpoint: CheckpointBytes | None,
) -> Ints:
    """The counts per layer that keep the largest sum of shares within the size.

    Every layer starts at the smallest allowed count that holds its guarded experts; then chunks up to the next allowed
    count are added by descending share per expert (per byte under `target_bytes`), smaller layers first among equals,
    until the next one does not fit. Since each layer's shares descend, this is the maximum whenever all chunks cost
    the same.

    Args:
        share_LE: Saliency of each expert as a fraction of its layer's sum.
        order_LE: Of `ranking.keep_order`.
        guarded_L: Experts of each layer that a guard keeps.

    Returns:
        count_L.

    Raises:
        PlanError: The smallest counts do not fit.
    """
    num_layers = len(share_LE)
    allowed_C = np.array(limits.allowed)
    first_L = np.searchsorted(allowed_C, np.maximum(guarded_L, limits.smallest))
    expert_bytes_L = np.ones(num_layers) if size.target_bytes is None else require_bytes(checkpoint).expert_bytes_L
    chunk_width_C = np.diff(allowed_C)
    kept_share_LE = np.cumsum(np.take_along_axis(share_LE, order_LE, axis=1), axis=1)
    gain_LC = np.diff(kept_share_LE[:, allowed_C - 1], axis=1) / chunk_width_C / expert_bytes_L[:, np.newaxis]
    is_floor_LC = np.arange(len(chunk_width_C)) < first_L[:, np.newaxis]
    # Experts that a guard drops come last whatever their share: a chunk never counts more than those before it.
    gain_LC = np.minimum.accumulate(np.where(is_floor_LC, np.inf, gain_LC), axis=1)
    layer_by_gain = np.argsort(-gain_LC, axis=None, kind="stable") // max(len(chunk_width_C), 1)

    def counts_with(num_chunks: int) -> Ints:
        counts: Ints = allowed_C[np.bincount(layer_by_gain[:num_chunks], minlength=num_layers)]
        return counts

    num_chunks = num_floor = int(is_floor_LC.sum())
    if not _fits(size, counts_with(num_floor), limits.num_experts, checkpoint):
        floor = int(counts_with(num_floor).sum())
        raise PlanError(
            f"{size} is less than the floor of the global budget, {floor} experts in {num_layers} layers "
            f"(at least {limits.smallest} in each)",
            "keep more, or guard fewer experts",
        )
    too_many = len(layer_by_gain) + 1
    while too_many - num_chunks > 1:
        middle = (num_chunks + too_many) // 2
        if _fits(size, counts_with(middle), limits.num_experts, checkpoint):
            num_chunks = middle
        else:
            too_many = middle
    return counts_with(num_chunks)


def _fits(size: Size, count_L: Ints, num_experts: int, checkpoint: CheckpointBytes | None) -> bool:
    if size.target_bytes is not None:
        return require_bytes(checkpoint).at(count_L) <= size.target_bytes
    if size.keep_fraction is not None:
        return int(count_L.sum()) <= rounded_count(size.keep_fraction, num_experts * len(count_L))
    assert size.keep_experts is not None
    if size.keep_experts > num_experts:
        raise PlanError(f"{size} is more than the {num_experts} experts of a layer", f"keep at most {num_experts}")
    return int(count_L.sum()) <= size.keep_experts * len(count_L)
