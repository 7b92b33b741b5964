"""Drift between two statistics: chance is told from change, and every figure can be worked out."""

from __future__ import annotations

import numpy as np
import pytest
from token_rows import random_tokens, statistics_of

from reap_serve.errors import MismatchError, RequestError
from reap_serve.statistics.drift import drift, dropped_gate_mass
from reap_serve.statistics.record import Statistics


def sample(seed: int, boosted: tuple[int, ...] = (), num_tokens: int = 1500) -> Statistics:
    """One sample of a traffic in which expert j has mean norm 1 + j / 16; boosted experts have three times theirs."""
    tokens = random_tokens(np.random.default_rng(seed), num_tokens, 3, 16, 2)
    norms = tokens.norm_TLK * (1 + tokens.expert_TLK / 16)
    norms = np.where(np.isin(tokens.expert_TLK, boosted), 3 * norms, norms)
    return statistics_of(type(tokens)(tokens.slice_T, tokens.phase_T, tokens.expert_TLK, tokens.gate_TLK, norms), 16)


def test_two_samples_of_one_traffic_seldom_look_like_drift() -> None:
    """At a significance of 5 % 1 of 20 pairs is expected; 6 or more have a probability below 0.1 %."""
    changed = [drift(sample(2 * i), sample(2 * i + 1), "reap", 8, seed=i).plan_would_change for i in range(20)]
    assert sum(changed) < 6


def test_experts_that_became_salient_are_found_and_nothing_else_is_needed() -> None:
    found = drift(sample(0), sample(1, boosted=(0, 1)), "reap", 8)
    assert found.plan_would_change
    assert any(layer.moved for layer in found.layers)
    # In each layer experts 0 and 1 enter the kept half and two others leave it.
    assert found.changed_decisions >= 3 * 4 - 2
    surest = {(expert.index, expert.expert) for expert in found.experts[:6]}
    assert surest == {(layer, expert) for layer in range(3) for expert in (0, 1)}
    assert all(expert.tells == "kept" for expert in found.experts[:6])
    assert all(low < expert.change < high for expert in found.experts for low, high in [expert.interval])


def test_statistics_do_not_differ_from_themselves() -> None:
    found = drift(sample(3), sample(3), "reap", 8)
    assert (found.changed_decisions, found.p_value, found.experts_moved) == (0, 1.0, 0)
    assert not found.plan_would_change


def test_totals_are_compared_per_token() -> None:
    """Four times the traffic multiplies every count and changes no share."""
    found = drift(sample(0, num_tokens=1000), sample(1, num_tokens=4000), "frequency", 8)
    assert found.experts_moved <= 2


def test_dropped_gate_mass_is_worked_out_by_layer() -> None:
    statistics = sample(0)
    kept_LE = np.ones((3, 16), np.bool_)
    kept_LE[1] = False
    kept_LE[1, 0] = True
    gate_LE = statistics.sums.gate_sum_SPLE.sum(axis=(0, 1))
    expected = (0 + gate_LE[1, 1:].sum() / gate_LE[1].sum() + 0) / 3
    assert dropped_gate_mass(statistics, kept_LE) == pytest.approx(expected)


def test_slices_that_are_new_or_gone_are_named() -> None:
    tokens = random_tokens(np.random.default_rng(5), 3000, 3, 16, 2, num_slices=2)
    both = statistics_of(tokens, 16, ("chat", "code"))
    chat = statistics_of(tokens[tokens.slice_T == 0], 16, ("chat",))
    found = {entry.slice: entry for entry in drift(chat, both, "reap", 8).slices}
    assert found["code"].token_share_before == 0
    assert found["code"].changed_decisions is None
    assert found["chat"].token_share_before == 1
    assert found["chat"].changed_decisions == 0
    assert 0 < found["code"].token_share_after < 1


@pytest.mark.parametrize("criterion", ["gate_sum", "random"])
def test_a_criterion_without_standard_error_is_refused(criterion: str) -> None:
    with pytest.raises(RequestError, match="no standard error"):
        drift(sample(0), sample(1), criterion, 8)


def test_models_and_counts_are_checked() -> None:
    other = statistics_of(random_tokens(np.random.default_rng(5), 100, 2, 16, 2), 16)
    with pytest.raises(MismatchError):
        drift(sample(0), other, "reap", 8)
    with pytest.raises(RequestError, match="cannot keep 16 of 16"):
        drift(sample(0), sample(1), "reap", 16)
