"""Which rows of a step are recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap_serve.record.sampling import STEP_TOKENS, RowSampler

TRASH = 6


def sampler(fraction: float) -> RowSampler:
    return RowSampler(fraction, TRASH, torch.device("cpu"))


def test_all_real_rows_are_taken_and_padding_is_trash() -> None:
    rows = sampler(1.0)
    rows.begin(np.array([0, TRASH, 3]))
    sample = rows.sampled_rows(5)
    assert sample is not None
    assert sample.rows.tolist() == [0, 2]
    assert sample.slots.tolist() == [0, 3]
    slots = rows.all_slots(5)
    assert slots is not None
    assert slots.tolist() == [0, TRASH, 3, TRASH, TRASH]
    assert (rows.real_tokens, rows.sampled_tokens) == (2, 2)


def test_between_two_steps_nothing_counts() -> None:
    rows = sampler(1.0)
    assert rows.sampled_rows(3) is None
    rows.begin(np.array([0]))
    rows.end()
    assert rows.sampled_rows(3) is None
    assert rows.all_slots(3) is None


def test_a_step_of_trash_alone_counts_nothing() -> None:
    rows = sampler(1.0)
    rows.begin(np.array([TRASH, TRASH]))
    assert rows.sampled_rows(2) is None
    assert rows.real_tokens == 0


def test_a_fraction_is_held_and_every_layer_sees_the_same_rows() -> None:
    rows = sampler(0.25)
    rows.begin(np.zeros(40_000, np.int64))
    first, second, slots = rows.sampled_rows(40_000), rows.sampled_rows(40_000), rows.all_slots(40_000)
    assert first is not None
    assert second is not None
    assert slots is not None
    assert torch.equal(first.rows, second.rows)
    # Binomial(40000, 0.25): five standard deviations are 433.
    assert abs(rows.sampled_tokens - 10_000) < 433
    assert torch.equal(torch.nonzero(slots != TRASH)[:, 0], first.rows)
    rows.reset()
    assert (rows.real_tokens, rows.sampled_tokens) == (0, 0)


def test_a_step_of_few_tokens_is_taken_as_a_whole_or_not_at_all() -> None:
    rows = sampler(0.25)
    taken = []
    for _ in range(4000):
        rows.begin(np.array([0, TRASH, 1, 0]))
        sample = rows.sampled_rows(4)
        taken.append([] if sample is None else sample.rows.tolist())
    assert [step for step in taken if step not in ([], [0, 2, 3])] == []
    # Binomial(4000, 0.25): five standard deviations are 137.
    assert abs(sum(map(bool, taken)) - 1000) < 137
    assert rows.real_tokens == 12_000


@pytest.mark.parametrize("num_tokens", [1, 16, STEP_TOKENS, 100, 5 * STEP_TOKENS])
def test_sums_over_the_sample_divided_by_the_fraction_are_unbiased(num_tokens: int) -> None:
    fraction, steps = 0.3, 3000
    rows = sampler(fraction)
    value_T = np.random.default_rng(1).lognormal(size=num_tokens)
    estimates = np.zeros(steps)
    chosen_T = np.zeros(num_tokens)
    for step in range(steps):
        rows.begin(np.zeros(num_tokens, np.int64))
        sample = rows.sampled_rows(num_tokens)
        if sample is not None:
            estimates[step] = value_T[sample.rows].sum() / fraction
            chosen_T[sample.rows] += 1
    standard_error = estimates.std() / np.sqrt(steps)
    assert abs(estimates.mean() - value_T.sum()) < 5 * standard_error
    # Every single token is as likely as the others: Binomial(3000, 0.3), five standard deviations are 126.
    assert np.abs(chosen_T - 900).max() < 126
