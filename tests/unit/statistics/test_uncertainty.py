"""Standard errors and the stability of a cut, against hand-worked numbers and simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from token_rows import Tokens, fingerprint, header, random_tokens, reap_standard_error, statistics_of

from reap_serve.errors import RequestError
from reap_serve.statistics.merge import join_batches
from reap_serve.statistics.record import ExpertSums, Statistics
from reap_serve.statistics.saliency import mix_slices, saliency, slice_terms
from reap_serve.statistics.uncertainty import (
    MIN_BATCHES,
    expected_instability,
    standard_error,
    tokens_for_instability,
)

Array = npt.NDArray[np.float64]


def of_values(value_TE: Array, routed_TE: npt.NDArray[np.bool_]) -> Statistics:
    """Statistics of one layer in which each token brings expert j the term g|f| = value, with g = 1."""
    weights_TE = value_TE * routed_TE
    sums = ExpertSums.zeros(1, 1, value_TE.shape[1])
    sums.token_count_SPLE[0, 0, 0] = routed_TE.sum(axis=0)
    sums.gate_sum_SPLE[0, 0, 0] = routed_TE.sum(axis=0)
    for field in ("norm", "weighted_norm"):
        getattr(sums, f"{field}_sum_SPLE")[0, 0, 0] = weights_TE.sum(axis=0)
        getattr(sums, f"{field}_sq_sum_SPLE")[0, 0, 0] = (weights_TE**2).sum(axis=0)
    model = fingerprint(1, value_TE.shape[1], 1)
    return Statistics(header(model, ("default",), "w0"), sums, np.array([[[len(value_TE)], [0]]]))


def test_pooled_slices_give_the_textbook_standard_error() -> None:
    tokens = random_tokens(np.random.default_rng(0), 60, 2, 5, 2, num_slices=3)
    statistics = statistics_of(tokens, 5, ("a", "b", "c"))
    # All tokens of an expert in one sample: scipy's and numpy's standard error of the mean.
    expected = np.zeros((2, 5))
    for row in range(2):
        for expert in range(5):
            chosen = tokens.expert_TLK[:, row] == expert
            terms = (tokens.gate_TLK[:, row] * tokens.norm_TLK[:, row])[chosen]
            expected[row, expert] = terms.std(ddof=1) / np.sqrt(len(terms))
    np.testing.assert_allclose(standard_error(slice_terms(statistics)), expected, rtol=1e-9)
    np.testing.assert_allclose(reap_standard_error(mix_slices(statistics)), expected, rtol=1e-9)


def test_totals_by_hand() -> None:
    # Four tokens, expert 0 gets two of them with norms 1 and 3: sum y = 4, sum y^2 = 10 over T = 4 tokens.
    statistics = of_values(np.array([[1.0], [3.0], [9.0], [9.0]]), np.array([[True], [True], [False], [False]]))
    terms = slice_terms(statistics)
    assert standard_error(terms, "ean_sum")[0, 0] == pytest.approx(np.sqrt(10 - 16 / 4))
    assert standard_error(terms, "weighted_ean_sum")[0, 0] == pytest.approx(np.sqrt(6))
    # A count of 2 in 4 is binomial: 4 * 1/2 * 1/2.
    assert standard_error(terms, "frequency")[0, 0] == pytest.approx(1.0)
    assert standard_error(terms, "ean_mean")[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("criterion", ["gate_sum", "msan", "asq", "random"])
def test_criteria_without_second_moment_have_no_error(criterion: str) -> None:
    statistics = statistics_of(random_tokens(np.random.default_rng(0), 20, 1, 4, 2), 4)
    assert np.isnan(standard_error(slice_terms(statistics), criterion)).all()
    with pytest.raises(RequestError, match="no criterion"):
        standard_error(slice_terms(statistics), "reep")


@pytest.mark.parametrize(("criterion", "square"), [("reap", "weighted_norm_sq_sum"), ("ean_sum", "norm_sq_sum")])
def test_squares_that_an_earlier_release_did_not_record_leave_no_error(criterion: str, square: str) -> None:
    terms = slice_terms(statistics_of(random_tokens(np.random.default_rng(0), 20, 1, 4, 2), 4))
    assert not np.isnan(standard_error(terms, criterion)).all()
    without = [
        replace(term, sums=replace(term.sums, by_name={k: v for k, v in term.sums.by_name.items() if k != square}))
        for term in terms
    ]
    assert np.isnan(standard_error(without, criterion)).all()


def test_fewer_than_two_tokens_have_no_error() -> None:
    statistics = of_values(np.array([[1.0, 1.0], [2.0, 1.0]]), np.array([[True, True], [True, False]]))
    error_E = standard_error(slice_terms(statistics))[0]
    assert error_E[0] == pytest.approx(0.5)
    assert np.isnan(error_E[1])


def test_intervals_cover_the_truth_when_tokens_are_independent() -> None:
    rng = np.random.default_rng(1)
    truth_E, covered, trials = np.array([1.0, 2.0, 3.0, 4.0]), 0, 400
    for _ in range(trials):
        routed_TE = rng.random((150, 4)) < 0.5
        statistics = of_values(truth_E * rng.lognormal(-0.125, 0.5, (150, 4)), routed_TE)
        estimate_E = saliency(mix_slices(statistics), "reap")[0]
        covered += (np.abs(estimate_E - truth_E) <= 1.96 * standard_error(slice_terms(statistics))[0]).sum()
    assert 0.92 <= covered / (4 * trials) <= 0.98


def test_weighted_mixtures_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered, trials = 0, 300
    for _ in range(trials):
        # Slice a has 4 times the tokens of b. Half and half, the truth is the mean of 1 and 3.
        sizes = {"a": 200, "b": 50}
        norms = np.concatenate([rng.lognormal(-0.125, 0.5, 200), 3 * rng.lognormal(-0.125, 0.5, 50)])
        tokens = Tokens(
            np.repeat([0, 1], list(sizes.values())),
            np.zeros(250, np.int64),
            np.zeros((250, 1, 1), np.int64),
            np.ones((250, 1, 1)),
            norms[:, None, None],
        )
        statistics = statistics_of(tokens, 1, ("a", "b"))
        weights = {"a": 0.5, "b": 0.5}
        estimate = saliency(mix_slices(statistics, weights), "reap")[0, 0]
        covered += abs(estimate - 2.0) <= 1.96 * standard_error(slice_terms(statistics, weights))[0, 0]
    assert 0.92 <= covered / trials <= 0.98


def correlated_parts(rng: np.random.Generator, num_batches: int) -> list[Statistics]:
    """Batches of 4 requests of 25 tokens; a request shifts all its tokens by one draw, so they are not independent."""
    parts = []
    for _ in range(num_batches):
        shift_TE = np.repeat(rng.normal(0, 0.5, (4, 3)), 25, axis=0)
        parts.append(of_values(3 + shift_TE + rng.normal(0, 0.5, (100, 3)), rng.random((100, 3)) < 0.7))
    return parts


def test_batches_cover_the_truth_where_tokens_do_not() -> None:
    rng = np.random.default_rng(3)
    covered = {"batches": 0, "tokens": 0}
    for _ in range(200):
        statistics = join_batches(correlated_parts(rng, 30))
        estimate_E = saliency(mix_slices(statistics), "reap")[0]
        for name, error_LE in (
            ("batches", standard_error(slice_terms(statistics))),
            ("tokens", reap_standard_error(mix_slices(statistics))),
        ):
            covered[name] += (np.abs(estimate_E - 3) <= 1.96 * error_LE[0]).sum()
    assert 0.92 <= covered["batches"] / 600 <= 0.98
    assert covered["tokens"] / 600 < 0.75


def test_few_batches_fall_back_on_tokens() -> None:
    parts = correlated_parts(np.random.default_rng(4), MIN_BATCHES)
    few = join_batches(parts[:-1])
    np.testing.assert_allclose(standard_error(slice_terms(few)), reap_standard_error(mix_slices(few)), rtol=1e-9)
    enough = join_batches(parts)
    assert (standard_error(slice_terms(enough)) > 1.5 * reap_standard_error(mix_slices(enough))).all()


def test_flips_match_what_halves_show() -> None:
    rng = np.random.default_rng(5)
    truth_LE = rng.lognormal(0, 0.3, (20, 64))
    error_LE = np.full(truth_LE.shape, 0.05)
    for keep in (16, 32, 48):
        predicted, measured = [], []
        for _ in range(20):
            first_LE, second_LE = (truth_LE + error_LE * rng.standard_normal(truth_LE.shape) for _ in range(2))
            predicted.append(expected_instability(first_LE, error_LE, keep).mean())
            kept = [np.argsort(np.argsort(-values_LE, axis=1), axis=1) < keep for values_LE in (first_LE, second_LE)]
            measured.append((kept[0] != kept[1]).mean())
        assert 1 / 1.5 < np.mean(predicted) / np.mean(measured) < 1.5


def test_certain_cuts_do_not_flip() -> None:
    saliency_LE = np.arange(8.0)[None]
    assert expected_instability(saliency_LE, np.zeros((1, 8)), 4)[0] == 0
    assert expected_instability(saliency_LE, np.full((1, 8), np.nan), 4)[0] == 0
    # All experts stay: there is nothing to decide.
    assert expected_instability(saliency_LE, np.ones((1, 8)), 8)[0] == 0


def test_two_equal_experts_flip_half_of_the_time() -> None:
    instability_L = expected_instability(np.array([[1.0, 1.0]]), np.array([[0.1, 0.1]]), 1)
    assert instability_L[0] == pytest.approx(0.5, abs=0.06)


def test_keep_counts_may_differ_between_layers() -> None:
    saliency_LE = np.array([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    instability_L = expected_instability(saliency_LE, np.full((2, 3), 1e-3), [1, 2])
    assert instability_L[0] == 0
    assert instability_L[1] == pytest.approx(1 / 3, abs=0.05)
    with pytest.raises(RequestError, match="cannot keep 4 of 3"):
        expected_instability(saliency_LE, saliency_LE, 4)


def test_tokens_needed_reach_the_threshold() -> None:
    rng = np.random.default_rng(6)
    saliency_LE, error_LE = rng.lognormal(0, 0.3, (10, 32)), np.full((10, 32), 0.1)
    assert expected_instability(saliency_LE, error_LE, 16).mean() > 0.05
    tokens = tokens_for_instability(saliency_LE, error_LE, 16, 1000, 0.02)
    assert tokens is not None
    growth = tokens / 1000
    assert expected_instability(saliency_LE, error_LE / np.sqrt(growth), 16).mean() == pytest.approx(0.02, rel=0.1)
    # Equal saliencies are never told apart.
    assert tokens_for_instability(np.ones((2, 4)), np.ones((2, 4)), 2, 1000, 0.02) is None
