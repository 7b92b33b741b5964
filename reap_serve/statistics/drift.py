"""Has the traffic moved, and would a new plan differ by more than chance?

Two statistics of one model are compared with two samples of one traffic. Given one of the two saliencies, that of
another sample of the same traffic lies around it with the variances of both added up (see `uncertainty`). Such
samples are drawn with a fixed seed and ranked alike, around either of the two; how many decisions then differ by chance
is known, and the observed number is held against the larger of the two.

Axes: L layers with routed experts, E experts, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reap_serve.errors import MismatchError, RequestError
from reap_serve.model import require_same_model
from reap_serve.statistics.drift_record import Drift, ExpertDrift, LayerDrift, SliceDrift
from reap_serve.statistics.merge import select_slices
from reap_serve.statistics.record import Floats, Statistics
from reap_serve.statistics.saliency import keep_largest, mix_slices, saliency, slice_terms
from reap_serve.statistics.uncertainty import is_total, standard_error

# Fewer for large models, whose many experts average them.
MAX_DRAWS = 400
MIN_DRAWS = 100
DRAWN_SALIENCIES = 2**22
# A change is called one where chance alone reaches it in fewer than one of twenty pairs of samples.
SIGNIFICANCE = 0.05
# Half of the width of a 95 % interval, in standard errors.
Z_95 = 1.959964

Pair = tuple[Floats, Floats]


def drift(
    before: Statistics, after: Statistics, criterion: str, keep: int, names: tuple[str, str] = ("A", "B"), seed: int = 0
) -> Drift:
    """Compares two statistics with what two samples of one traffic would differ by.

    The slices of each are pooled as observed, so that a shift between slices counts as drift.

    Args:
        before: What the plan in use was made from.
        after: What was observed since.
        criterion: Name in `saliency.CRITERIA`, one with a standard error: `reap`, `ean_mean`, `frequency`, ...
        keep: Experts kept per layer.
        names: Of the two, for errors.
        seed: Of the draws.

    Raises:
        MismatchError: They are of different models or layers.
        RequestError: There is no such criterion, it has no standard error here, or `keep` is out of range.
    """
    require_same_model(before.header.model, after.header.model, *names)
    if before.header.layers != after.header.layers:
        raise MismatchError(
            f"{names[0]} covers {len(before.header.layers)} layers, {names[1]} {len(after.header.layers)} or others",
            "merge the files of all pipeline ranks first",
        )
    num_experts = before.header.model.num_experts
    if not 1 <= keep < num_experts:
        raise RequestError(f"cannot keep {keep} of {num_experts} experts", f"keep 1 to {num_experts - 1}")
    saliencies, errors = _estimates(before, after, criterion)
    if any(np.isnan(error_LE).all() for error_LE in errors):
        raise RequestError(
            f"{criterion} has no standard error on these statistics: chance cannot be told from change",
            "compare by reap",
        )
    chance = _Chance(saliencies, errors, keep, seed)
    kept_LE = [keep_largest(saliency_LE, keep) for saliency_LE in saliencies]
    experts = _moved_experts(before, saliencies, errors, kept_LE)
    total = chance.total
    return Drift(
        criterion=criterion,
        keep_experts=keep,
        plan_would_change=chance.p_value(total, chance.drawn_DL.sum(axis=1)) < SIGNIFICANCE,
        changed_decisions=total,
        by_chance=_ends(chance.drawn_DL.sum(axis=1)),
        p_value=chance.p_value(total, chance.drawn_DL.sum(axis=1)),
        experts_moved=len(experts),
        layers=tuple(
            LayerDrift(
                layer=layer.name,
                index=layer.index,
                changed_decisions=int(chance.observed_L[row]),
                by_chance=_ends(chance.drawn_DL[:, row]),
                moved=chance.p_value(int(chance.observed_L[row]), chance.drawn_DL[:, row]) < SIGNIFICANCE,
            )
            for row, layer in enumerate(before.header.layers)
        ),
        slices=tuple(_slices(before, after, criterion, keep, kept_LE[0], seed)),
        experts=experts,
    )


class _Chance:
    """How many decisions differ between two statistics, and between samples of one traffic.

    Attributes:
        observed_L: Decisions that differ.
        total: Over all layers.
        drawn_DL: Decisions that differ by chance, around the saliency of the two where more do.
    """

    def __init__(self, saliencies: Pair, errors: Pair, keep: int, seed: int) -> None:
        kept = [keep_largest(values_LE, keep) for values_LE in saliencies]
        # An expert hardly seen has no error: it stays where it is, which errs towards calling a change one.
        deviation_LE = np.sqrt(np.nan_to_num(errors[0]) ** 2 + np.nan_to_num(errors[1]) ** 2)
        num_draws = min(MAX_DRAWS, max(MIN_DRAWS, DRAWN_SALIENCIES // deviation_LE.size))
        rng = np.random.default_rng(seed)

        def drawn_around(values_LE: Floats, kept_LE: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
            again = (values_LE + deviation_LE * rng.standard_normal(values_LE.shape) for _ in range(num_draws))
            return np.stack([_differing(keep_largest(again_LE, keep), kept_LE) for again_LE in again])

        drawn = [drawn_around(*pair) for pair in zip(saliencies, kept, strict=True)]
        self.observed_L = _differing(*kept)
        self.total = int(self.observed_L.sum())
        self.drawn_DL = max(drawn, key=lambda drawn_DL: int(drawn_DL.sum()))

    @staticmethod
    def p_value(observed: int, drawn_D: npt.NDArray[np.int64]) -> float:
        """Share of the pairs, the observed one among them, that differ at least as much."""
        return (1 + int((drawn_D >= observed).sum())) / (1 + len(drawn_D))


def _estimates(before: Statistics, after: Statistics, criterion: str) -> tuple[Pair, Pair]:
    """Saliencies and standard errors of both; totals are taken per token of the layer, so that lengths do not count."""
    saliencies, errors = [], []
    for statistics in (before, after):
        sums = mix_slices(statistics)
        scale_L1 = np.maximum(sums.layer_token_count_L, 1)[:, None] if is_total(criterion) else np.ones((1, 1))
        saliencies.append(saliency(sums, criterion) / scale_L1)
        errors.append(standard_error(slice_terms(statistics), criterion) / scale_L1)
    return (saliencies[0], saliencies[1]), (errors[0], errors[1])


def _differing(left_LE: npt.NDArray[np.bool_], right_LE: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    differing_L: npt.NDArray[np.int64] = (left_LE != right_LE).sum(axis=1)
    return differing_L


def _ends(drawn_D: npt.NDArray[np.int64]) -> tuple[float, float]:
    low, high = np.percentile(drawn_D, [2.5, 97.5])
    return float(low), float(high)


def _moved_experts(
    before: Statistics, saliencies: Pair, errors: Pair, kept_LE: Sequence[npt.NDArray[np.bool_]]
) -> tuple[ExpertDrift, ...]:
    """Experts that moved, by two-sided normal tests and Benjamini and Hochberg's procedure (1995)."""
    change_LE = saliencies[1] - saliencies[0]
    error_LE = np.sqrt(errors[0] ** 2 + errors[1] ** 2)
    rows, experts = np.nonzero(np.nan_to_num(error_LE) > 0)
    if not len(rows):
        return ()
    z = np.abs(change_LE[rows, experts] / error_LE[rows, experts])
    p = np.array([math.erfc(value / math.sqrt(2)) for value in z])
    order = np.argsort(p, kind="stable")
    passed = p[order] <= SIGNIFICANCE * np.arange(1, len(p) + 1) / len(p)
    count = int(np.flatnonzero(passed)[-1]) + 1 if passed.any() else 0
    found = []
    for position in order[:count]:
        row, expert = int(rows[position]), int(experts[position])
        change, half = float(change_LE[row, expert]), Z_95 * float(error_LE[row, expert])
        was_kept, is_kept = bool(kept_LE[0][row, expert]), bool(kept_LE[1][row, expert])
        found.append(
            ExpertDrift(
                index=before.header.layers[row].index,
                expert=expert,
                before=float(saliencies[0][row, expert]),
                after=float(saliencies[1][row, expert]),
                change=change,
                interval=(change - half, change + half),
                tells=None if was_kept == is_kept else ("kept" if is_kept else "dropped"),
            )
        )
    return tuple(found)


def _slices(
    before: Statistics, after: Statistics, criterion: str, keep: int, kept_LE: npt.NDArray[np.bool_], seed: int
) -> list[SliceDrift]:
    found = []
    shares = [dict(zip(statistics.header.slices, _shares(statistics), strict=True)) for statistics in (before, after)]
    for name in sorted(shares[0].keys() | shares[1].keys()):
        parts = [
            select_slices(statistics, [name]) if name in statistics.header.slices else None
            for statistics in (before, after)
        ]
        changed = by_chance = moved = None
        if parts[0] is not None and parts[1] is not None:
            chance = _Chance(*_estimates(parts[0], parts[1], criterion), keep, seed)
            drawn_D = chance.drawn_DL.sum(axis=1)
            changed, by_chance = chance.total, _ends(drawn_D)
            moved = chance.p_value(chance.total, drawn_D) < SIGNIFICANCE
        masses = [None if part is None else dropped_gate_mass(part, kept_LE) for part in parts]
        found.append(
            SliceDrift(
                slice=name,
                token_share_before=shares[0].get(name, 0.0),
                token_share_after=shares[1].get(name, 0.0),
                changed_decisions=changed,
                by_chance=by_chance,
                moved=moved,
                dropped_gate_mass_before=masses[0],
                dropped_gate_mass_after=masses[1],
            )
        )
    return found


def _shares(statistics: Statistics) -> list[float]:
    tokens = statistics.tokens_per_slice()
    return [count / max(1, sum(tokens)) for count in tokens]


def dropped_gate_mass(statistics: Statistics, kept_LE: npt.NDArray[np.bool_]) -> float | None:
    """Share of the gate weight that falls on dropped experts: mean over the layers of sum of g dropped / sum of g.

    Args:
        statistics: All their slices pooled.
        kept_LE: The plan.

    Returns:
        None where no gate weight was recorded.
    """
    gate_LE = statistics.sums.gate_sum_SPLE.sum(axis=(0, 1))
    total_L = gate_LE.sum(axis=1)
    if not (total_L > 0).any():
        return None
    dropped_L = np.where(kept_LE, 0.0, gate_LE).sum(axis=1)
    seen_L = total_L > 0
    return float((dropped_L[seen_L] / total_L[seen_L]).mean())
