"""KL divergence of two models from the likeliest tokens that each reports.

Axes: N tokens, K likeliest tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reap_serve.compare.scores import TokenScores

Floats = npt.NDArray[np.float64]

# Log-probabilities arrive as float32: what K of them leave of 1 is known to about this.
REST_RESOLUTION = 1e-6


def kl_divergence(base: TokenScores, candidate: TokenScores) -> Floats:
    """KL(base || candidate) per token, in nats, on a partition whose cells both models report: a lower bound.

    The cells are each token among the K likeliest of both models, the token that is there, and one cell for all
    others: sum over cells c of P(c) log(P(c) / Q(c)). By the data-processing inequality KL on a partition never exceeds
    KL over the whole vocabulary (Cover and Thomas, Elements of Information Theory, 2.8). The probability of the others
    is taken as at least 1e-6, which can move the result by about as much.

    Args:
        base: The base's scores of N tokens.
        candidate: The candidate's scores of the same tokens.

    Returns:
        Shape N, not negative.
    """
    # Row by row, which of the candidate's K is the base's k-th: exact, and K is 20.
    same_NKK = base.top_ids_NK[:, :, None] == candidate.top_ids_NK[:, None, :]
    same_NKK &= (base.top_ids_NK >= 0)[:, :, None]
    shared_NK = same_NKK.any(axis=2)
    log_p_NK = np.where(shared_NK, base.top_logprobs_NK, 0.0)
    log_q_NK = np.where(shared_NK, np.take_along_axis(candidate.top_logprobs_NK, same_NKK.argmax(axis=2), axis=1), 0.0)
    p_NK = np.where(shared_NK, np.exp(log_p_NK), 0.0)
    q_NK = np.where(shared_NK, np.exp(log_q_NK), 0.0)
    divergence_N = (p_NK * (log_p_NK - log_q_NK)).sum(axis=1)
    rest_p_N, rest_q_N = 1.0 - p_NK.sum(axis=1), 1.0 - q_NK.sum(axis=1)
    # The token that is there has a log-probability in both, whatever its rank: a cell of its own where it has none.
    alone_N = ~(shared_NK & (base.top_ids_NK == base.token_ids_N[:, None])).any(axis=1)
    p_there_N, q_there_N = np.exp(base.logprob_N), np.exp(candidate.logprob_N)
    divergence_N += np.where(alone_N, p_there_N * (base.logprob_N - candidate.logprob_N), 0.0)
    rest_p_N = np.maximum(rest_p_N - np.where(alone_N, p_there_N, 0.0), REST_RESOLUTION)
    rest_q_N = np.maximum(rest_q_N - np.where(alone_N, q_there_N, 0.0), REST_RESOLUTION)
    divergence_N += rest_p_N * np.log(rest_p_N / rest_q_N)
    # Rounding can leave an identical pair at -1e-8.
    bounded_N: Floats = np.maximum(divergence_N, 0.0)
    return bounded_N
