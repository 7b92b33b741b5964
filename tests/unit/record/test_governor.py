"""The sampled fraction that holds the budget, worked by hand."""

from __future__ import annotations

import pytest

from reap_serve.record.governor import LONGEST_SECONDS, MINIMUM_FRACTION, OverheadGovernor


def governor(budget: float = 0.02, ceiling: float = 1.0) -> OverheadGovernor:
    return OverheadGovernor(budget, ceiling, buffer_tokens=100)


def test_the_fraction_follows_the_share_towards_three_tenths_of_the_budget() -> None:
    chosen = governor()
    assert chosen.fraction == MINIMUM_FRACTION == 0.01
    # A share of 0.004, where 0.006 is wanted.
    assert chosen.fraction_after(busy_seconds=2.0, own_seconds=0.008, sampled_tokens=100) == pytest.approx(0.015)
    # The next second, by itself: 0.00375.
    fraction = chosen.fraction_after(busy_seconds=3.0, own_seconds=0.01175, sampled_tokens=200)
    assert fraction == pytest.approx(0.015 * 1.6)


def test_nothing_changes_before_a_buffer_is_full() -> None:
    chosen = governor()
    assert chosen.fraction_after(busy_seconds=LONGEST_SECONDS / 2, own_seconds=0.0, sampled_tokens=99) == 0.01
    # Too few tokens for a buffer: half a minute is the end.
    assert chosen.fraction_after(busy_seconds=LONGEST_SECONDS, own_seconds=0.0, sampled_tokens=99) == 0.02


def test_the_ceiling_and_the_floor_hold_and_no_change_is_larger_than_twofold() -> None:
    chosen = governor(ceiling=0.05)
    cheap = [
        chosen.fraction_after(busy_seconds=turn + 1.0, own_seconds=0.0, sampled_tokens=100 * (turn + 1))
        for turn in range(4)
    ]
    assert cheap == [0.02, 0.04, 0.05, 0.05]
    dear = [
        chosen.fraction_after(busy_seconds=turn + 5.0, own_seconds=turn + 1.0, sampled_tokens=100 * (turn + 5))
        for turn in range(4)
    ]
    assert dear == [0.025, 0.0125, MINIMUM_FRACTION, MINIMUM_FRACTION]


@pytest.mark.parametrize("fixed_share", [0.0, 0.002, 0.004])
def test_a_share_of_which_a_part_is_fixed_reaches_the_aim(fixed_share: float) -> None:
    chosen = governor()
    own_seconds, share = 0.0, 0.0
    for turn in range(60):
        share = fixed_share + 0.1 * chosen.fraction
        own_seconds += share
        chosen.fraction_after(busy_seconds=turn + 1.0, own_seconds=own_seconds, sampled_tokens=100 * (turn + 1))
    assert share == pytest.approx(0.006, rel=1e-3)


def test_a_recorder_that_holds_back_is_judged_by_whole_buffers() -> None:
    chosen = governor()
    own_seconds, sampled = 0.0, 0.0
    total_own = []
    for turn in range(400):
        before = int(sampled / 100)
        sampled += 500 * chosen.fraction
        # A buffer of 100 tokens costs 0.1 s when it is full: 6 tokens a second hold the aim.
        own_seconds += 0.1 * (int(sampled / 100) - before)
        total_own.append(own_seconds)
        chosen.fraction_after(busy_seconds=turn + 1.0, own_seconds=own_seconds, sampled_tokens=int(sampled))
    assert (total_own[-1] - total_own[200]) / 199 == pytest.approx(0.006, rel=0.15)
