"""The fraction after each step, on one rank and on several that agree."""

from __future__ import annotations

import torch

from reap_serve.record.governor import MINIMUM_FRACTION
from reap_serve.record.pace import JUDGE_STEPS, Pace

CPU = torch.device("cpu")


def test_a_budget_begins_at_the_smallest_fraction_and_none_at_all_tokens() -> None:
    assert Pace(0.02, 1.0, 64, CPU, None).fraction == MINIMUM_FRACTION
    assert Pace(0.02, 0.005, 64, CPU, None).fraction == 0.005
    assert Pace(None, 0.5, 64, CPU, None).fraction == 0.5


def test_the_fraction_follows_what_was_measured_each_second() -> None:
    pace = Pace(0.02, 1.0, 64, CPU, None)
    pace.busy.add(0.9)
    pace.step_is_over(64)
    assert pace.fraction == MINIMUM_FRACTION
    pace.busy.add(0.1)
    pace.own.add(0.004)
    pace.step_is_over(64)
    # A share of 0.004, where three tenths of 0.02 are wanted.
    assert abs(pace.fraction - 0.015) < 1e-9


def test_ranks_agree_on_the_first_ones_figure_in_the_same_step() -> None:
    """The second rank finds recording three times as dear; both follow the first."""
    said: list[float] = []

    def of_first(value: float) -> float:
        said.append(value)
        return value

    first = Pace(0.02, 1.0, 64, CPU, of_first)
    second = Pace(0.02, 1.0, 64, CPU, lambda value: said[-1])
    fractions = []
    for step in range(3 * JUDGE_STEPS):
        for pace, own in ((first, 0.00004), (second, 0.00012)):
            pace.busy.add(0.01 if pace is first else 0.02)
            pace.own.add(own)
            pace.step_is_over(step + 1)
        fractions.append((first.fraction, second.fraction))
    assert all(one == other for one, other in fractions)
    # 0.004 of the time: one and a half times the fraction, three times in a row.
    assert [round(each, 6) for each in said] == [0.015, 0.0225, 0.03375]
    assert len(said) == 3


def test_a_stream_that_has_passed_nothing_changes_nothing() -> None:
    pace = Pace(0.02, 1.0, 1, CPU, lambda value: value)
    for step in range(JUDGE_STEPS):
        pace.step_is_over(step)
    assert pace.fraction == MINIMUM_FRACTION
