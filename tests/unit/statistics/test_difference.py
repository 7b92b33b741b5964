"""Differences between statistics, against scipy and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from token_rows import fingerprint, random_tokens, statistics_of

from reap_serve.errors import MismatchError
from reap_serve.statistics.difference import difference, mean_of, spearman


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_spearman_is_scipys_also_with_ties(pairs: list[tuple[int, int]]) -> None:
    left, right = np.array(pairs, np.float64).T
    found = spearman(left, right)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(left, right).statistic, abs=1e-12)


def test_same_statistics_do_not_differ() -> None:
    statistics = statistics_of(random_tokens(np.random.default_rng(0), 200, 2, 8, 2), 8)
    for layer in difference(statistics, statistics, "reap", 4):
        assert layer.spearman == pytest.approx(1.0)
        assert layer.kept_overlap == 1.0
        assert layer.kept_overlap_expected is not None
        assert 0 < layer.kept_overlap_expected < 1


def test_overlap_by_hand() -> None:
    left = statistics_of(random_tokens(np.random.default_rng(0), 100, 1, 4, 2), 4)
    right = statistics_of(random_tokens(np.random.default_rng(0), 100, 1, 4, 2), 4)
    for statistics, counts in ((left, [4, 3, 2, 1]), (right, [4, 1, 2, 3])):
        statistics.sums.token_count_SPLE[:] = 0
        statistics.sums.token_count_SPLE[0, 0, 0] = counts
    (layer,) = difference(left, right, "frequency", 2)
    assert layer.kept_overlap == 0.5
    # Ranks 4 3 2 1 and 4 1 2 3: 1 - 6 (0 + 4 + 0 + 4) / (4 * 15) = 0.2.
    assert layer.spearman == pytest.approx(0.2)


def test_no_expectation_without_errors() -> None:
    statistics = statistics_of(random_tokens(np.random.default_rng(0), 20, 1, 4, 2), 4)
    assert difference(statistics, statistics, "random", 2)[0].kept_overlap_expected is None
    assert mean_of([None, None]) is None
    assert mean_of([1.0, None, 2.0]) == 1.5


def test_other_models_are_refused() -> None:
    statistics = statistics_of(random_tokens(np.random.default_rng(0), 20, 1, 4, 2), 4)
    header = statistics.header.model_copy(update={"model": fingerprint(1, 4, 2, weights="x")})
    with pytest.raises(MismatchError, match="weights_sha256"):
        difference(statistics, replace(statistics, header=header), "reap", 2)
