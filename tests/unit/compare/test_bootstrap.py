"""Intervals: worked by hand where there is a closed form, against scipy's bootstrap, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reap_serve.compare.bootstrap import Bootstrap, lower_end, share_interval


def test_share_interval_is_wilsons() -> None:
    for count, total in ((0, 32), (3, 32), (16, 32), (32, 32), (1, 1)):
        theirs = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
        assert share_interval(count, total) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert share_interval(0, 0) is None


def test_no_event_in_32_answers_leaves_room_for_one_in_nine() -> None:
    interval = share_interval(0, 32)
    assert interval is not None
    # z^2 / (n + z^2) = 3.8415 / 35.8415
    assert interval == pytest.approx((0.0, 0.10718), abs=1e-5)


def test_ratio_agrees_with_scipys_bca() -> None:
    generator = np.random.default_rng(5)
    weight = generator.integers(20, 200, size=60).astype(np.float64)
    total = weight * generator.gamma(2.0, 0.1, size=60)
    ours = Bootstrap(60, resamples=20000).ratio(total, weight)
    confidence = 1.0 - 2.0 * float(stats.norm.cdf(lower_end(60)))
    theirs = stats.bootstrap(
        (total, weight),
        lambda sums, weights, axis: sums.sum(axis=axis) / weights.sum(axis=axis),
        paired=True,
        n_resamples=20000,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours is not None
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)


def test_a_rising_function_moves_the_ends_with_it() -> None:
    generator = np.random.default_rng(6)
    total, weight = generator.gamma(2.0, 1.0, size=30), np.ones(30)
    plain, moved = Bootstrap(30).ratio(total, weight), Bootstrap(30).ratio(total, weight, np.exp)
    assert plain is not None
    assert moved == pytest.approx(tuple(np.exp(plain)))


def test_what_does_not_vary_has_an_interval_of_no_width() -> None:
    assert Bootstrap(10).ratio(np.zeros(10), np.ones(10)) == (0.0, 0.0)
    assert Bootstrap(10).quantiles([np.full(4, 2.5)] * 10, (0.5, 0.99)) == [(2.5, 2.5), (2.5, 2.5)]


def test_one_request_has_no_interval() -> None:
    assert Bootstrap(1).ratio(np.ones(1), np.ones(1)) is None
    assert Bootstrap(1).quantiles([np.ones(5)], (0.5,)) is None


def test_the_same_requests_give_the_same_interval() -> None:
    total, weight = np.arange(12.0), np.ones(12)
    assert Bootstrap(12).ratio(total, weight) == Bootstrap(12).ratio(total, weight)


def test_quantiles_are_those_of_resamples_written_out() -> None:
    generator = np.random.default_rng(7)
    values = [generator.exponential(size=size) for size in (3, 8, 5, 13, 2, 9)]
    bootstrap = Bootstrap(6, resamples=200)
    times = np.random.default_rng(20260101).multinomial(6, np.full(6, 1 / 6), size=200)
    found = [
        np.quantile(np.concatenate([np.tile(value, count) for value, count in zip(values, row, strict=True)]), 0.9,
                    method="lower")
        for row in times
    ]  # fmt: skip
    tail = float(stats.norm.cdf(lower_end(6)))
    assert bootstrap.quantiles(values, (0.9,)) == [pytest.approx(tuple(np.quantile(found, (tail, 1.0 - tail))))]


def test_the_ends_are_those_of_t_expanded() -> None:
    for clusters in (8, 20, 60, 1000):
        theirs = -np.sqrt(clusters / (clusters - 1)) * stats.t.ppf(0.975, clusters - 1)
        assert lower_end(clusters) == pytest.approx(theirs, abs=0.02)


def test_tokens_of_one_request_do_not_count_as_many() -> None:
    """Requests differ, tokens within one do not: 50 tokens of each say no more than one."""
    level = np.random.default_rng(8).normal(size=25)
    one = Bootstrap(25).ratio(level, np.ones(25))
    fifty = Bootstrap(25).ratio(50.0 * level, np.full(25, 50.0))
    assert one == pytest.approx(fifty)


def test_intervals_cover_the_truth() -> None:
    """Mean of skewed values, 40 requests a draw, 400 draws: 95 % +- 3 binomial standard errors, less some for skew."""
    generator = np.random.default_rng(9)
    hits = 0
    for _ in range(400):
        tokens = generator.integers(20, 120, size=40).astype(np.float64)
        interval = Bootstrap(40).ratio(tokens * generator.gamma(1.5, 1.0, size=40), tokens)
        assert interval is not None
        hits += interval[0] <= 1.5 <= interval[1]
    assert 0.90 <= hits / 400 <= 0.985
