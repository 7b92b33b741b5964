"""Saliency: from sums to one number per layer and expert, by a named criterion.

Axes: L layers with routed experts, E experts. g is the gate weight that the model applies to the output f of an
expert; all sums run over the tokens routed to the expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from reap_serve.errors import RequestError
from reap_serve.statistics.record import BATCH_FIELDS, MAX_FIELDS, Floats, Statistics


@dataclass(frozen=True, slots=True)
class MixedSums:
    """Sums over phases and a mixture of slices; float64, since weighted counts are no integers.

    Attributes:
        token_count_LE: Routed tokens.
        gate_sum_LE: Sum of g.
        norm_sum_LE: Sum of |f|.
        norm_sq_sum_LE: Sum of |f|^2.
        weighted_norm_sum_LE: Sum of g|f|.
        weighted_norm_sq_sum_LE: Sum of (g|f|)^2.
        norm_max_LE: Largest |f|.
        activation_max_LE: Largest absolute component of f.
        layer_token_count_L: Tokens that passed the layer.
    """

    token_count_LE: Floats
    gate_sum_LE: Floats
    norm_sum_LE: Floats
    norm_sq_sum_LE: Floats
    weighted_norm_sum_LE: Floats
    weighted_norm_sq_sum_LE: Floats
    norm_max_LE: Floats
    activation_max_LE: Floats
    layer_token_count_L: Floats


@dataclass(frozen=True, slots=True)
class BatchMoments:
    """Moments of one slice's batches, axes [L, E]; see `record.BatchSums`."""

    count_LE: Floats
    weighted_sq_LE: Floats
    cross_LE: Floats
    token_sq_LE: Floats


@dataclass(frozen=True, slots=True)
class SliceTerm:
    """One slice's part of a mixture.

    Attributes:
        name: Of the slice.
        sums: Its sums over the phases, unscaled.
        scale_L: Factor on these sums in the mixture; 1 when slices are pooled as observed.
        batches: Moments of its batches, unscaled.
    """

    name: str
    sums: MixedSums
    scale_L: Floats
    batches: BatchMoments


def slice_terms(statistics: Statistics, weights: Mapping[str, float] | None = None) -> tuple[SliceTerm, ...]:
    """The slices' parts of a mixture.

    Args:
        statistics: The sums.
        weights: Share of the mixture's tokens that each slice contributes, of any positive total; slices that are
            not named are left out. None pools all slices as observed.

    Returns:
        The terms; the scales keep each layer's total token count, so weights proportional to the observed tokens
        give scales of 1.

    Raises:
        RequestError: A slice does not exist, a weight is not positive and finite, or a slice has no token in a layer.
    """
    moments = statistics.batch_sums()
    terms = tuple(
        SliceTerm(
            name,
            _sum_phases(statistics, s),
            np.ones(len(statistics.header.layers)),
            BatchMoments(*(getattr(moments, field)[s].astype(np.float64) for field in BATCH_FIELDS)),
        )
        for s, name in enumerate(statistics.header.slices)
    )
    if weights is None:
        return terms
    _require_weights(weights, statistics.header.slices)
    named = [term for term in terms if term.name in weights]
    total_L = np.sum([term.sums.layer_token_count_L for term in named], axis=0)
    total_weight = sum(weights.values())
    scaled = []
    for term in named:
        count_L = term.sums.layer_token_count_L
        if not count_L.all():
            layer = statistics.header.layers[int(np.flatnonzero(count_L == 0)[0])]
            raise RequestError(f"slice {term.name} has no token in {layer.name}", "observe it or leave it out")
        scaled.append(replace(term, scale_L=weights[term.name] / total_weight * total_L / count_L))
    return tuple(scaled)


def mix_slices(statistics: Statistics, weights: Mapping[str, float] | None = None) -> MixedSums:
    """The sums over phases and a mixture of slices; maxima are not scaled.

    Args and errors as in `slice_terms`.
    """
    terms = slice_terms(statistics, weights)
    mixed: dict[str, Floats] = {}
    for field in MixedSums.__dataclass_fields__:
        parts = [getattr(term.sums, field) for term in terms]
        if field in _MAXIMA:
            mixed[field] = np.max(parts, axis=0)
        else:
            scales = [term.scale_L if field == "layer_token_count_L" else term.scale_L[:, None] for term in terms]
            mixed[field] = np.sum([part * scale for part, scale in zip(parts, scales, strict=True)], axis=0)
    return MixedSums(**mixed)


def saliency(sums: MixedSums, criterion: str, seed: int = 0) -> Floats:
    """Saliency of each expert, axes [L, E]; the lowest of a layer is dropped first.

    An expert without tokens has saliency 0, also where the formula divides by its count: nothing was lost on this
    traffic without it. `random` alone does not look at the sums.

    Args:
        sums: See `mix_slices`.
        criterion: A name in `CRITERIA`.
        seed: Of `random`; the others ignore it.

    Raises:
        RequestError: There is no such criterion.
    """
    if criterion == "random":
        return np.random.default_rng(seed).random(sums.token_count_LE.shape)
    return _formula(criterion)(sums)


def reap_standard_error(sums: MixedSums) -> Floats:
    """Standard error of `reap`, axes [L, E], for slices pooled as observed and tokens taken as independent.

    The standard deviation of g|f| over the routed tokens, with n - 1 in the denominator, over the root of n; NaN
    below two tokens, where no spread can be seen. Tokens of one request are not independent: `uncertainty` has the
    standard error that counts with this.
    """
    n_LE = sums.token_count_LE
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_LE = sums.weighted_norm_sum_LE / n_LE
        variance_LE = np.maximum(sums.weighted_norm_sq_sum_LE / n_LE - mean_LE**2, 0)
        return np.where(n_LE >= 2, np.sqrt(variance_LE / (n_LE - 1)), np.nan)


def _mean(sum_LE: Floats, count_LE: Floats) -> Floats:
    return np.divide(sum_LE, count_LE, out=np.zeros_like(sum_LE), where=count_LE > 0)


# Names and formulas. reap, frequency, ean_sum, ean_mean, weighted_ean_sum: arXiv 2510.13999; gate_sum: the soft count
# of SEER-MoE, arXiv 2404.05089; msan, the mean square norm on routed tokens: arXiv 2606.15716; asq, the energy of what
# an expert adds to the residual stream, is the diagonal of HOPE's matrix, F_jj = sum of (g|f|)^2: arXiv 2609.18916.
# When to use which: plan/README.md.
CRITERIA: Mapping[str, Callable[[MixedSums], Floats] | None] = {
    "reap": lambda sums: _mean(sums.weighted_norm_sum_LE, sums.token_count_LE),
    "frequency": lambda sums: sums.token_count_LE,
    "gate_sum": lambda sums: sums.gate_sum_LE,
    "ean_sum": lambda sums: sums.norm_sum_LE,
    "ean_mean": lambda sums: _mean(sums.norm_sum_LE, sums.token_count_LE),
    "weighted_ean_sum": lambda sums: sums.weighted_norm_sum_LE,
    "msan": lambda sums: _mean(sums.norm_sq_sum_LE, sums.token_count_LE),
    "asq": lambda sums: sums.weighted_norm_sq_sum_LE,
    "random": None,
}

_MAXIMA = frozenset(field.replace("_SPLE", "_LE") for field in MAX_FIELDS)


def _formula(criterion: str) -> Callable[[MixedSums], Floats]:
    formula = CRITERIA.get(criterion)
    if formula is None:
        raise RequestError(f"there is no criterion {criterion}", f"use one of: {', '.join(CRITERIA)}")
    return formula


def _sum_phases(statistics: Statistics, s: int) -> MixedSums:
    summed: dict[str, Floats] = {}
    for field in MixedSums.__dataclass_fields__:
        if field == "layer_token_count_L":
            summed[field] = statistics.layer_token_count_SPL[s].sum(axis=0).astype(np.float64)
            continue
        values_PLE = getattr(statistics.sums, field.replace("_LE", "_SPLE"))[s]
        combined = values_PLE.max(axis=0) if field in _MAXIMA else values_PLE.sum(axis=0)
        summed[field] = combined.astype(np.float64)
    return MixedSums(**summed)


def _require_weights(weights: Mapping[str, float], slices: tuple[str, ...]) -> None:
    for name, weight in weights.items():
        if name not in slices:
            raise RequestError(f"there is no slice {name}", f"use one of: {', '.join(slices)}")
        if not (np.isfinite(weight) and weight > 0):
            raise RequestError(f"the weight of slice {name} is {weight}", "give a positive number")
    if not weights:
        raise RequestError("the mixture names no slice", f"use some of: {', '.join(slices)}")
