"""Saliency: from sums to one number per layer and expert, by a named criterion.

Axes: L layers with routed experts, E experts. g is the gate weight that the model applies to the output f of an
expert; all sums run over the tokens routed to the expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from reap_serve.errors import RequestError
from reap_serve.statistics.record import BATCH_FIELDS, EXPERT_SUMS, Floats, Statistics
from reap_serve.statistics.sums import Merge


@dataclass(frozen=True, slots=True)
class MixedSums:
    """Sums over phases and a mixture of slices; float64, since weighted counts are no integers.

    A declared sum of one number an expert is the attribute of its name with its axes, such as `norm_sum_LE`; a
    RequestError where the statistics lack it.

    Attributes:
        by_name: Those sums that the statistics have, axes [L, E].
        layer_token_count_L: Tokens that passed the layer.
    """

    by_name: Mapping[str, Floats]
    layer_token_count_L: Floats

    def __getattr__(self, attribute: str) -> Floats:
        name = attribute.removesuffix("_LE")
        if name == attribute:
            raise AttributeError(f"{attribute} is no sum [L, E]")
        if name not in self.by_name:
            raise RequestError(
                f"the statistics do not have {name}", "observe again: earlier releases did not record it"
            )
        return self.by_name[name]


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
    for name in terms[0].sums.by_name:
        parts = [term.sums.by_name[name] for term in terms]
        if name in _MAXIMA:
            mixed[name] = np.max(parts, axis=0)
        else:
            scaled = [part * term.scale_L[:, None] for part, term in zip(parts, terms, strict=True)]
            mixed[name] = np.sum(scaled, axis=0)
    return MixedSums(mixed, np.sum([term.sums.layer_token_count_L * term.scale_L for term in terms], axis=0))


def saliency(sums: MixedSums, criterion: str, seed: int = 0) -> Floats:
    """Saliency of each expert, axes [L, E]; the lowest of a layer is dropped first.

    An expert without tokens has saliency 0, also where the formula divides by its count: nothing was lost on this
    traffic without it. `random` alone does not look at the sums.

    Args:
        sums: See `mix_slices`.
        criterion: A name in `CRITERIA`.
        seed: Of `random`; the others ignore it.

    Raises:
        RequestError: There is no such criterion, or the statistics lack one of its sums.
    """
    if criterion == "random":
        return np.random.default_rng(seed).random(sums.token_count_LE.shape)
    return _formula(criterion)(sums)


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

# Those that divide by the expert's tokens.
MEANS = frozenset({"reap", "ean_mean", "msan"})

_MAXIMA = frozenset(each.name for each in EXPERT_SUMS if each.merge is Merge.MAX)


def keep_largest(saliency_LE: Floats, keep: int | npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which experts have the largest saliencies, axes [L, E]; of equal ones the lower id does, as in plans.

    Args:
        saliency_LE: The saliency.
        keep: Experts kept, of every layer or of each, axis [L].
    """
    # A stable sort of the negated values.
    order_LE = np.argsort(-saliency_LE, axis=1, kind="stable")
    kept_LE = np.zeros(saliency_LE.shape, np.bool_)
    np.put_along_axis(kept_LE, order_LE, np.arange(saliency_LE.shape[1]) < np.reshape(keep, (-1, 1)), axis=1)
    return kept_LE


def _formula(criterion: str) -> Callable[[MixedSums], Floats]:
    formula = CRITERIA.get(criterion)
    if formula is None:
        raise RequestError(f"there is no criterion {criterion}", f"use one of: {', '.join(CRITERIA)}")
    return formula


def _sum_phases(statistics: Statistics, s: int) -> MixedSums:
    summed: dict[str, Floats] = {}
    for each in EXPERT_SUMS:
        values_SPLE = getattr(statistics.sums, each.field)
        if each.is_per_expert and values_SPLE is not None:
            summed[each.name] = each.merge.combine.reduce(values_SPLE[s], axis=0).astype(np.float64)
    return MixedSums(summed, statistics.layer_token_count_SPL[s].sum(axis=0).astype(np.float64))


def _require_weights(weights: Mapping[str, float], slices: tuple[str, ...]) -> None:
    for name, weight in weights.items():
        if name not in slices:
            raise RequestError(f"there is no slice {name}", f"use one of: {', '.join(slices)}")
        if not (np.isfinite(weight) and weight > 0):
            raise RequestError(f"the weight of slice {name} is {weight}", "give a positive number")
    if not weights:
        raise RequestError("the mixture names no slice", f"use some of: {', '.join(slices)}")
