"""How far two statistics of one model lie apart: has the traffic moved, and would the choice?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reap_serve.errors import MismatchError
from reap_serve.model import require_same_model
from reap_serve.statistics.record import Floats, Statistics
from reap_serve.statistics.saliency import keep_largest, mix_slices, saliency, slice_terms
from reap_serve.statistics.uncertainty import expected_instability, standard_error


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """One layer of two statistics.

    Attributes:
        layer: Name.
        index: Index of the decoder layer.
        spearman: Rank correlation of the saliencies; None when one of them is the same for all experts.
        kept_overlap: Fraction of the kept experts that both keep.
        kept_overlap_expected: The same for two samples of one traffic, from the standard errors; None when there are
            none. An overlap well below it means that the traffic differs, not only the sample.
    """

    layer: str
    index: int
    spearman: float | None
    kept_overlap: float
    kept_overlap_expected: float | None


def difference(
    left: Statistics, right: Statistics, criterion: str, keep: int, names: tuple[str, str] = ("A", "B")
) -> tuple[LayerDifference, ...]:
    """Compares two statistics, layer by layer, all their slices pooled.

    Args:
        left: One.
        right: The other.
        criterion: Name in `saliency.CRITERIA`.
        keep: Experts kept per layer.
        names: Of the two, for errors.

    Raises:
        MismatchError: They are of different models or layers.
        RequestError: There is no such criterion, or `keep` is out of range.
    """
    require_same_model(left.header.model, right.header.model, *names)
    if left.header.layers != right.header.layers:
        raise MismatchError(
            f"{names[0]} covers {len(left.header.layers)} layers, {names[1]} {len(right.header.layers)} or others",
            "merge the files of all pipeline ranks first",
        )
    saliencies, errors = [], []
    for statistics in (left, right):
        saliencies.append(saliency(mix_slices(statistics), criterion))
        errors.append(standard_error(slice_terms(statistics), criterion))
    # For two samples of equal error e, `expected_instability` takes e; here their mean square.
    error_LE = np.sqrt((errors[0] ** 2 + errors[1] ** 2) / 2)
    instability_L = expected_instability(saliencies[0], error_LE, keep)
    num_experts = left.header.model.num_experts
    kept_LE = [keep_largest(saliency_LE, keep) for saliency_LE in saliencies]
    found = []
    for row, layer in enumerate(left.header.layers):
        expected = None if np.isnan(error_LE[row]).all() else 1 - float(instability_L[row]) * num_experts / (2 * keep)
        found.append(
            LayerDifference(
                layer.name,
                layer.index,
                spearman(saliencies[0][row], saliencies[1][row]),
                int((kept_LE[0][row] & kept_LE[1][row]).sum()) / keep,
                expected,
            )
        )
    return tuple(found)


def spearman(left_E: Floats, right_E: Floats) -> float | None:
    """Rank correlation: Pearson's of the ranks, equal values sharing their mean rank; None without spread.

    Not scipy's, whose tests hold it to the same numbers: statistics are read and planned from without scipy.
    """
    ranks = [_mean_ranks(values_E) for values_E in (left_E, right_E)]
    centred = [rank_E - rank_E.mean() for rank_E in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else None


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _mean_ranks(values_E: Floats) -> Floats:
    _, inverse_E, counts = np.unique(values_E, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    mean_rank: Floats = last_rank - (counts - 1) / 2
    return mean_rank[inverse_E]
