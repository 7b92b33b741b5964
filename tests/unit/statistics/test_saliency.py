"""Saliency: formulas worked by hand, and mixtures of slices."""

from __future__ import annotations

import numpy as np
import pytest
from token_rows import Tokens, random_tokens, reap_standard_error, statistics_of

from reap_serve.cli.plan_options import CRITERIA_HELP
from reap_serve.errors import RequestError
from reap_serve.statistics.record import Statistics
from reap_serve.statistics.saliency import CRITERIA, MEANS, MixedSums, mix_slices, saliency, slice_terms


def by_hand() -> Statistics:
    """Three tokens, two experts each of three: token 0 to (0, 1), token 1 to (0, 1), token 2 of slice b to (0, 1).

    Expert 0: (g, |f|) = (0.5, 2), (0.25, 4), and in b (1, 3). Expert 1: (0.5, 1), (0.75, 1), and in b (0, 5).
    Expert 2 has no token.
    """
    return statistics_of(
        Tokens(
            np.array([0, 0, 1]),
            np.array([0, 1, 1]),
            np.array([[[0, 1]], [[0, 1]], [[0, 1]]]),
            np.array([[[0.5, 0.5]], [[0.25, 0.75]], [[1.0, 0.0]]]),
            np.array([[[2.0, 1.0]], [[4.0, 1.0]], [[3.0, 5.0]]]),
        ),
        3,
        ("a", "b"),
    )


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # Terms g|f| of expert 0: 1, 1, 3; of expert 1: 0.5, 0.75, 0.
        ("reap", [5 / 3, 1.25 / 3, 0]),
        ("frequency", [3, 3, 0]),
        ("gate_sum", [1.75, 1.25, 0]),
        ("ean_sum", [9, 7, 0]),
        ("ean_mean", [3, 7 / 3, 0]),
        ("weighted_ean_sum", [5, 1.25, 0]),
        ("msan", [(4 + 16 + 9) / 3, 27 / 3, 0]),
        ("asq", [1 + 1 + 9, 0.25 + 0.5625, 0]),
    ],
)
def test_criteria_by_hand(criterion: str, expected: list[float]) -> None:
    np.testing.assert_allclose(saliency(mix_slices(by_hand()), criterion), [expected], rtol=1e-15)


def test_every_criterion_of_the_contract_is_there() -> None:
    names = ["reap", "frequency", "gate_sum", "ean_sum", "ean_mean", "weighted_ean_sum", "msan", "asq", "random"]
    assert list(CRITERIA) == names
    assert CRITERIA_HELP.replace(" or ", ", ").removesuffix(".").split(", ") == names


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random"}))
def test_a_mean_does_not_grow_with_the_tokens(criterion: str) -> None:
    once = mix_slices(by_hand())
    twice = MixedSums({name: 2 * values_LE for name, values_LE in once.by_name.items()}, 2 * once.layer_token_count_L)
    assert np.array_equal(saliency(twice, criterion), saliency(once, criterion)) is (criterion in MEANS)


def test_a_sum_that_an_earlier_release_did_not_record_is_named() -> None:
    known = mix_slices(by_hand())
    without = MixedSums(
        {name: values_LE for name, values_LE in known.by_name.items() if name != "gate_sum"}, known.layer_token_count_L
    )
    with pytest.raises(RequestError, match="the statistics do not have gate_sum; observe again"):
        saliency(without, "gate_sum")


def test_random_depends_on_the_seed_alone() -> None:
    tokens = random_tokens(np.random.default_rng(0), 10, 2, 4, 2)
    sums = [mix_slices(statistics_of(part, 4)) for part in (tokens[:5], tokens[5:])]
    assert np.array_equal(saliency(sums[0], "random", 1), saliency(sums[1], "random", 1))
    assert not np.array_equal(saliency(sums[0], "random", 1), saliency(sums[0], "random", 2))


def test_unknown_criterion_lists_those_there() -> None:
    with pytest.raises(RequestError, match="use one of: reap, frequency"):
        saliency(mix_slices(by_hand()), "reep")


def test_a_weight_is_the_share_of_tokens() -> None:
    # Slice a has 2 tokens, b has 1. At equal shares each contributes 1.5 of the 3: a counts 0.75, b 1.5 times.
    mixed = mix_slices(by_hand(), {"a": 2.0, "b": 2.0})
    np.testing.assert_allclose(mixed.layer_token_count_L, [3])
    np.testing.assert_allclose(mixed.token_count_LE, [[3, 3, 0]])
    np.testing.assert_allclose(mixed.weighted_norm_sum_LE, [[0.75 * 2 + 1.5 * 3, 0.75 * 1.25, 0]])
    # Maxima are not scaled.
    np.testing.assert_allclose(mixed.norm_max_LE, [[4, 5, 0]])


def test_weights_in_proportion_to_the_tokens_pool_as_observed() -> None:
    pooled, mixed = mix_slices(by_hand()), mix_slices(by_hand(), {"a": 2.0, "b": 1.0})
    for field in (*(f"{name}_LE" for name in pooled.by_name), "layer_token_count_L"):
        np.testing.assert_allclose(getattr(mixed, field), getattr(pooled, field), rtol=1e-15, err_msg=field)


def test_slices_without_weight_are_left_out() -> None:
    mixed = mix_slices(by_hand(), {"b": 0.1})
    np.testing.assert_allclose(saliency(mixed, "reap"), [[3, 0, 0]])
    np.testing.assert_allclose(mixed.norm_max_LE, [[3, 5, 0]])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 1.0}, "there is no slice c"),
        ({"a": 0.0}, "weight of slice a is 0"),
        ({"a": -1.0}, "weight of slice a is -1"),
        ({"a": float("nan")}, "weight of slice a is nan"),
        ({}, "names no slice"),
    ],
)
def test_wrong_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        mix_slices(by_hand(), weights)


def test_a_slice_without_tokens_cannot_be_weighted() -> None:
    statistics = by_hand()
    statistics.layer_token_count_SPL[1] = 0
    with pytest.raises(RequestError, match=r"slice b has no token in model\.layers\.0"):
        slice_terms(statistics, {"a": 1.0, "b": 1.0})


def test_standard_error_by_hand() -> None:
    # Expert 0: 1, 1, 3 have mean 5/3 and variance ((2/3)^2 * 2 + (4/3)^2) / 2 = 4/3; the error is sqrt(4/3 / 3) = 2/3.
    error_LE = reap_standard_error(mix_slices(by_hand()))
    np.testing.assert_allclose(error_LE[0, 0], 2 / 3, rtol=1e-12)
    assert np.isnan(error_LE[0, 2])
