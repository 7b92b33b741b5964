"""KL divergence from the likeliest tokens: worked by hand, and against the divergence over the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reap_serve.compare.divergence import REST_RESOLUTION, kl_divergence
from reap_serve.compare.scores import TokenScores

Floats = npt.NDArray[np.float64]


def scores_of(logprob_NV: Floats, token_ids: list[int], k: int) -> TokenScores:
    """What an endpoint would report of whole distributions."""
    top_ids_NK = np.argsort(-logprob_NV, axis=1, kind="stable")[:, :k]
    return TokenScores(
        np.array(token_ids),
        logprob_NV[np.arange(len(token_ids)), token_ids],
        top_ids_NK,
        np.take_along_axis(logprob_NV, top_ids_NK, axis=1),
    )


def log_softmax(logits_NV: Floats) -> Floats:
    shifted = logits_NV - logits_NV.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def test_cells_are_shared_tokens_the_token_that_is_there_and_the_others() -> None:
    base = TokenScores(np.array([9]), np.log([0.05]), np.array([[1, 2, 3]]), np.log([[0.5, 0.25, 0.1]]))
    candidate = TokenScores(np.array([9]), np.log([0.02]), np.array([[2, 4, 1]]), np.log([[0.4, 0.3, 0.2]]))
    # Cells: token 1, token 2, token 9, all others.
    expected = (
        0.5 * math.log(0.5 / 0.2)
        + 0.25 * math.log(0.25 / 0.4)
        + 0.05 * math.log(0.05 / 0.02)
        + 0.2 * math.log(0.2 / 0.38)
    )
    np.testing.assert_allclose(kl_divergence(base, candidate), [expected], rtol=1e-12)


def test_a_shared_token_that_is_there_is_one_cell_not_two() -> None:
    base = TokenScores(np.array([1]), np.log([0.75]), np.array([[1, 2]]), np.log([[0.75, 0.15]]))
    candidate = TokenScores(np.array([1]), np.log([0.5]), np.array([[1, 3]]), np.log([[0.5, 0.3]]))
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    np.testing.assert_allclose(kl_divergence(base, candidate), [expected], rtol=1e-12)


def test_fill_of_short_rows_is_no_token() -> None:
    base = TokenScores(np.array([1]), np.log([0.6]), np.array([[1, -1]]), np.array([[math.log(0.6), -np.inf]]))
    candidate = TokenScores(np.array([1]), np.log([0.3]), np.array([[1, -1]]), np.array([[math.log(0.3), -np.inf]]))
    expected = 0.6 * math.log(2.0) + 0.4 * math.log(0.4 / 0.7)
    np.testing.assert_allclose(kl_divergence(base, candidate), [expected], rtol=1e-12)


def test_no_token_gives_no_divergence() -> None:
    empty = TokenScores(np.empty(0, np.int64), np.empty(0), np.empty((0, 20), np.int64), np.empty((0, 20)))
    assert kl_divergence(empty, empty).shape == (0,)


PAIRS = st.integers(2, 40).flatmap(
    lambda vocabulary: st.tuples(
        arrays(np.float64, (3, vocabulary), elements=st.floats(-12, 12)),
        arrays(np.float64, (3, vocabulary), elements=st.floats(-12, 12)),
        st.lists(st.integers(0, vocabulary - 1), min_size=3, max_size=3),
        st.integers(1, vocabulary),
    )
)


@settings(deadline=None, max_examples=200)
@given(PAIRS)
def test_it_is_a_lower_bound_of_the_whole_vocabulary(drawn: tuple[Floats, Floats, list[int], int]) -> None:
    base_logits, candidate_logits, token_ids, k = drawn
    log_p, log_q = log_softmax(base_logits), log_softmax(candidate_logits)
    whole = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    part = kl_divergence(scores_of(log_p, token_ids, k), scores_of(log_q, token_ids, k))
    assert (part >= 0).all()
    # The floor of the others' probability moves either way by about itself.
    assert (part <= whole + 3 * REST_RESOLUTION).all()


@settings(deadline=None, max_examples=50)
@given(PAIRS)
def test_all_tokens_reported_give_the_whole_divergence(drawn: tuple[Floats, Floats, list[int], int]) -> None:
    base_logits, candidate_logits, token_ids, _ = drawn
    log_p, log_q = log_softmax(base_logits), log_softmax(candidate_logits)
    whole = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    k = log_p.shape[1]
    np.testing.assert_allclose(
        kl_divergence(scores_of(log_p, token_ids, k), scores_of(log_q, token_ids, k)), whole, atol=1e-9
    )


@settings(deadline=None, max_examples=50)
@given(PAIRS)
def test_a_model_does_not_diverge_from_itself(drawn: tuple[Floats, Floats, list[int], int]) -> None:
    logits, _, token_ids, k = drawn
    scores = scores_of(log_softmax(logits), token_ids, k)
    np.testing.assert_array_equal(kl_divergence(scores, scores), np.zeros(3))
