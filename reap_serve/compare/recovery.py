"""Recovery: what share of the base's task score the candidate keeps, with its interval. Axes: C items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from reap_serve.compare.bootstrap import CONFIDENCE, Bootstrap, Interval
from reap_serve.compare.record import TaskReport
from reap_serve.compare.task_results import TaskScore

# With fewer points of the base, resamples without any are too many to leave out.
MIN_BASE_SUM = 10.0

_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2.0)


def task_reports(base: Sequence[TaskScore], candidate: Sequence[TaskScore]) -> tuple[TaskReport, ...]:
    """The metrics that both models have, in the order of their names."""
    found = {(score.tool, score.task, score.metric): score for score in candidate}
    pairs = [(score, found[key]) for score in base if (key := (score.tool, score.task, score.metric)) in found]
    return tuple(task_report(one, other) for one, other in pairs)


def task_report(base: TaskScore, candidate: TaskScore) -> TaskReport:
    """One metric on both models."""
    items = base.num_items if base.num_items == candidate.num_items else None
    recovery = None if base.value <= 0.0 or not base.higher_is_better else 100.0 * candidate.value / base.value
    paired = None if recovery is None else _paired(base, candidate)
    errors = None if recovery is None or paired is not None else _from_errors(base, candidate)
    return TaskReport(
        tool=base.tool,
        task=base.task,
        metric=base.metric,
        items=items,
        base=base.value,
        candidate=candidate.value,
        recovery_percent=recovery,
        recovery_interval=paired or errors,
        method="pairs" if paired is not None else "standard errors" if errors is not None else None,
    )


def _paired(base: TaskScore, candidate: TaskScore) -> Interval | None:
    """By bootstrap over the items that both were asked: sum of the candidate's values over sum of the base's."""
    both = _item_values(base, candidate)
    if both is None:
        return None
    base_C, candidate_C = both
    # An aggregate that is no mean of its items has no interval from them.
    means = ((base_C.mean(), base.value), (candidate_C.mean(), candidate.value))
    if base_C.sum() < MIN_BASE_SUM or any(not math.isclose(mean, value, abs_tol=1e-6) for mean, value in means):
        return None
    interval = Bootstrap(len(base_C)).ratio(candidate_C, base_C)
    return None if interval is None else (100.0 * interval[0], 100.0 * interval[1])


def _item_values(
    base: TaskScore, candidate: TaskScore
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    if base.items is None or candidate.items is None or base.num_items != candidate.num_items:
        return None
    if base.tool == "bfcl":
        # Items that are not listed passed; those that neither lists passed in both.
        assert base.num_items is not None
        listed = sorted({*base.items, *candidate.items})
        rest = np.ones(base.num_items - len(listed))
        columns = [np.array([score.items.get(item, 1.0) for item in listed]) for score in (base, candidate)]  # type: ignore[union-attr]
        return np.concatenate((columns[0], rest)), np.concatenate((columns[1], rest))
    if base.items.keys() != candidate.items.keys() or not base.items:
        return None
    order = sorted(base.items)
    return np.array([base.items[item] for item in order]), np.array([candidate.items[item] for item in order])


def _from_errors(base: TaskScore, candidate: TaskScore) -> Interval | None:
    """Fieller's interval (1954) of a ratio of two independent means, from their standard errors.

    With g = z^2 s_b^2 / b^2 and r = c / b:

        (r ± (z / b) sqrt(s_c^2 (1 - g) + r^2 s_b^2)) / (1 - g)

    Returns:
        None where the base's score is not sure to differ from 0, g >= 1.
    """
    if base.stderr is None or candidate.stderr is None:
        return None
    g = (_Z * base.stderr / base.value) ** 2
    if g >= 1.0:
        return None
    ratio = candidate.value / base.value
    width = _Z / base.value * math.sqrt(candidate.stderr**2 * (1.0 - g) + (ratio * base.stderr) ** 2)
    return 100.0 * (ratio - width) / (1.0 - g), 100.0 * (ratio + width) / (1.0 - g)
