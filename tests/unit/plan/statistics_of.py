"""Statistics made up by hand or at random, for tests of the planner."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from statistics_factory import fingerprint, header

from reap_serve.statistics.record import ExpertSums, Statistics


def statistics(
    slices: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], top_k: int = 2, architecture: str = "qwen3_moe"
) -> Statistics:
    """Statistics of which each slice gives token counts and the REAP of each expert, both [L, E].

    Gates are 0.5, and all tokens of an expert have the same norm.
    """
    names = tuple(slices)
    counts = np.stack([np.asarray(slices[name][0], np.int64) for name in names])
    reap = np.stack([np.asarray(slices[name][1], np.float64) for name in names])
    num_slices, num_layers, num_experts = counts.shape
    zero = np.zeros((num_slices, 1, num_layers, num_experts))

    def phases(prefill: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.concatenate([prefill[:, None], zero], axis=1)

    sums = ExpertSums(
        token_count_SPLE=phases(counts).astype(np.int64),
        gate_sum_SPLE=phases(0.5 * counts),
        norm_sum_SPLE=phases(2 * reap * counts),
        norm_sq_sum_SPLE=phases((2 * reap) ** 2 * counts),
        weighted_norm_sum_SPLE=phases(reap * counts),
        weighted_norm_sq_sum_SPLE=phases(reap**2 * counts),
        norm_max_SPLE=phases(2 * reap),
        activation_max_SPLE=phases(reap),
    )
    layer_tokens = phases(counts)[..., :].sum(axis=-1).astype(np.int64) // top_k
    model = fingerprint(num_layers, num_experts, top_k, architecture=architecture)
    return Statistics(header(model, names), sums, layer_tokens)


def random_statistics(num_slices: int, num_layers: int, num_experts: int, top_k: int = 2, seed: int = 0) -> Statistics:
    """Statistics with experts of very different use, specialised by slice."""
    rng = np.random.default_rng(seed)
    shape = (num_slices, num_layers, num_experts)
    counts = rng.integers(1, 1000, shape) * top_k
    reap = rng.lognormal(0.0, 1.0, (1, *shape[1:])) * rng.lognormal(0.0, 0.7, shape)
    return statistics({f"slice{s}": (counts[s], reap[s]) for s in range(num_slices)}, top_k)
