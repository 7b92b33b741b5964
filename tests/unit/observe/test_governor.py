"""The sampled fraction that holds the budget, worked by hand."""

from __future__ import annotations

import pytest

from reap_serve.observe.governor import MINIMUM_FRACTION, OverheadGovernor


def test_the_fraction_makes_the_cost_three_quarters_of_the_budget() -> None:
    governor = OverheadGovernor(budget=0.02, ceiling=1.0)
    assert governor.fraction == 0.05
    # 1000 real tokens a second, 1 ms a sampled token: 15 of 1000 sampled tokens take three quarters of 0.02 s of each
    # second.
    fraction = governor.fraction_after(busy_seconds=2.0, own_seconds=0.1, real_tokens=2000, sampled_tokens=100)
    assert fraction == pytest.approx(0.015)


def test_nothing_changes_before_a_second_has_passed() -> None:
    governor = OverheadGovernor(budget=0.02, ceiling=1.0)
    assert governor.fraction_after(busy_seconds=0.9, own_seconds=0.5, real_tokens=10, sampled_tokens=10) == 0.05


def test_the_ceiling_and_the_floor_hold() -> None:
    cheap = OverheadGovernor(budget=0.5, ceiling=0.3)
    assert cheap.fraction_after(busy_seconds=2.0, own_seconds=1e-6, real_tokens=10, sampled_tokens=10) == 0.3
    dear = OverheadGovernor(budget=0.01, ceiling=1.0)
    fraction = dear.fraction_after(busy_seconds=2.0, own_seconds=100.0, real_tokens=10**6, sampled_tokens=10)
    assert fraction == MINIMUM_FRACTION


def test_without_a_sampled_token_nothing_is_known_and_nothing_changes() -> None:
    governor = OverheadGovernor(budget=0.02, ceiling=1.0)
    assert governor.fraction_after(busy_seconds=5.0, own_seconds=0.0, real_tokens=10, sampled_tokens=0) == 0.05
