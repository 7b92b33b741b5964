"""Intervals: worked by hand where there is a closed form, against resamples written out, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reap_serve.compare.bootstrap import Bootstrap, lower_end, rests_on_few, share_interval


def test_share_interval_is_wilsons() -> None:
    """(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    z = 1.959963985
    for count, total in ((0, 32), (3, 32), (16, 32), (32, 32), (1, 1)):
        p = count / total
        width = z * np.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
        ends = [(p + z**2 / (2 * total) + sign * width) / (1 + z**2 / total) for sign in (-1, 1)]
        assert share_interval(count, total) == pytest.approx(ends, abs=1e-9)
    assert share_interval(0, 0) is None


def test_no_event_in_32_answers_leaves_room_for_one_in_nine() -> None:
    interval = share_interval(0, 32)
    assert interval is not None
    # z^2 / (n + z^2) = 3.8415 / 35.8415
    assert interval == pytest.approx((0.0, 0.10718), abs=1e-5)


def test_ratio_is_that_of_studentised_resamples_written_out() -> None:
    generator = np.random.default_rng(5)
    weight = generator.integers(20, 200, size=30).astype(np.float64)
    total = weight * generator.gamma(2.0, 0.1, size=30)

    def ratio_and_error(totals: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
        value = totals.mean() / weights.mean()
        return value, float(np.std(totals - value * weights, ddof=1) / np.sqrt(len(totals)) / weights.mean())

    value, error = ratio_and_error(total, weight)
    found = []
    for times in np.random.default_rng(20260101).multinomial(30, np.full(30, 1 / 30), size=1000):
        drawn = np.repeat(np.arange(30), times)
        its_value, its_error = ratio_and_error(total[drawn], weight[drawn])
        found.append((its_value - value) / its_error)
    low, high = np.quantile(found, (0.025, 0.975))
    assert Bootstrap(30).ratio(total, weight) == pytest.approx((value - high * error, value - low * error))


def test_the_interval_of_one_event_among_many_is_poissons() -> None:
    """One of 100 requests has all: the mean is 0.01, and Poisson's interval of one event in 100 is 0.0003 to 0.0557."""
    total = np.zeros(100)
    total[3] = 1.0
    interval = Bootstrap(100).ratio(total, np.ones(100))
    assert interval is not None
    assert interval[0] == 0.0
    assert interval[1] == pytest.approx(stats.chi2.ppf(0.975, 4) / 2 / 100, rel=0.001)


def test_an_interval_of_a_mean_stays_among_its_values() -> None:
    """All but one right: neither above 1 nor, of two requests, beyond either."""
    right = np.ones(40)
    right[7] = 0.0
    interval = Bootstrap(40).ratio(right, np.ones(40))
    assert interval is not None
    assert interval[1] == 1.0
    # 1 - 5.57 / 40
    assert interval[0] == pytest.approx(0.86075)
    assert Bootstrap(2).ratio(np.array([1.0, 3.0]), np.ones(2)) == (1.0, 3.0)


def test_a_request_without_weight_counts_where_it_adds_something() -> None:
    """As of tasks: what the candidate alone gets right has no share of the base's points."""
    base, candidate = np.array([1.0, 1.0, 0.0, 0.0] * 6), np.array([1.0, 0.0, 1.0, 0.0] * 6)
    interval = Bootstrap(24).ratio(candidate, base)
    assert interval is not None
    assert 0.0 <= interval[0] < 1.0 < interval[1]
    assert np.isfinite(interval[1])


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


@pytest.mark.parametrize(("clusters", "t"), [(1, 12.7062), (2, 12.7062), (8, 2.3646), (20, 2.0930), (61, 2.0003)])
def test_the_ends_are_those_of_t_expanded(clusters: int, t: float) -> None:
    """t of the printed tables, 97.5 %, of C - 1 degrees of freedom; two requests where there is one."""
    counted = max(clusters, 2)
    assert lower_end(clusters) == pytest.approx(-np.sqrt(counted / (counted - 1)) * t, rel=1e-4)


def test_tokens_of_one_request_do_not_count_as_many() -> None:
    """Requests differ, tokens within one do not: 50 tokens of each say no more than one."""
    level = np.random.default_rng(8).normal(size=25)
    one = Bootstrap(25).ratio(level, np.ones(25))
    fifty = Bootstrap(25).ratio(50.0 * level, np.full(25, 50.0))
    assert one == pytest.approx(fifty)


@pytest.mark.parametrize(("sigma", "least"), [(0.3, 0.92), (1.0, 0.90)])
def test_intervals_cover_the_truth(sigma: float, least: float) -> None:
    """Mean of log-normal values, 40 requests a draw, 400 draws: 95 % +- 3 binomial standard errors, less some for skew.

    The skewness is 0.95 and 6.2: of the latter, quantiles of resampled means cover 88 %.
    """
    generator = np.random.default_rng(9)
    hits = 0
    for _ in range(400):
        tokens = generator.integers(20, 120, size=40).astype(np.float64)
        interval = Bootstrap(40).ratio(tokens * generator.lognormal(0.0, sigma, size=40), tokens)
        assert interval is not None
        hits += interval[0] <= np.exp(sigma**2 / 2) <= interval[1]
    assert least <= hits / 400 <= 0.985


def test_which_figures_rest_on_few_requests() -> None:
    """One of C has all: g = (C - 2) / sqrt(C - 1), 25 g^2 is about 25 C. Two equal groups have g = 0."""
    one = np.zeros(50)
    one[0] = 1.0
    assert rests_on_few(one, np.ones(50))
    # Also where all but one are right.
    assert rests_on_few(1.0 - one, np.ones(50))
    assert not rests_on_few(np.tile((0.0, 1.0), 25), np.ones(50))
    assert not rests_on_few(np.full(50, 3.0), np.ones(50))


def test_few_requests_are_told_by_cochrans_rule() -> None:
    """k of C values are 1: g = (1 - 2p) / sqrt(p (1 - p)); for p = 0.1, g^2 = 64 / 9 and 25 g^2 = 177.8."""
    assert rests_on_few(np.repeat((1.0, 0.0), (17, 153)), np.ones(170))
    assert not rests_on_few(np.repeat((1.0, 0.0), (18, 162)), np.ones(180))
