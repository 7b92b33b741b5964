"""What the candidate lost, from both models' log-probabilities of the same tokens.

Names follow llama.cpp's perplexity report. Axes: N tokens, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reap_serve.compare.endpoint import TokenScores
from reap_serve.compare.record import Quality

Floats = npt.NDArray[np.float64]

LOOP_MAX_PERIOD = 64
LOOP_MIN_REPEATS = 4
LOOP_MIN_TOKENS = 32


def kl_divergence(base: TokenScores, candidate: TokenScores) -> Floats:
    """KL(base || candidate) per token, in nats, on a partition that both models report: a lower bound.

    The cells are the tokens among the K likeliest of both models and one cell for all others. By the data-processing
    inequality, KL on a partition never exceeds KL over the whole vocabulary.
    """
    divergence = np.zeros(base.logprob_N.shape[0])
    for position in range(divergence.shape[0]):
        shared, in_base, in_candidate = np.intersect1d(
            base.top_ids_NK[position], candidate.top_ids_NK[position], return_indices=True
        )
        present = shared >= 0
        log_p = base.top_logprobs_NK[position, in_base[present]]
        log_q = candidate.top_logprobs_NK[position, in_candidate[present]]
        p = np.exp(log_p)
        rest_p = max(1.0 - p.sum(), 1e-12)
        rest_q = max(1.0 - np.exp(log_q).sum(), 1e-12)
        divergence[position] = (p * (log_p - log_q)).sum() + rest_p * np.log(rest_p / rest_q)
    # Rounding of logprobs to float32 can leave an identical pair at -1e-8.
    return np.maximum(divergence, 0.0)


def loops(token_ids: Sequence[int]) -> bool:
    """Whether an answer ends in a loop: a period of at most 64 tokens, 4 times at least and over at least 32 tokens."""
    tokens = np.asarray(token_ids)
    for period in range(1, LOOP_MAX_PERIOD + 1):
        span = max(LOOP_MIN_REPEATS * period, LOOP_MIN_TOKENS)
        if span > tokens.shape[0]:
            return False
        tail = tokens[-span:]
        if np.array_equal(tail[period:], tail[:-period]):
            return True
    return False


def perplexity(scores: Sequence[TokenScores]) -> float:
    """exp(-mean logprob) over all tokens of some requests."""
    return float(np.exp(-np.concatenate([request.logprob_N for request in scores]).mean()))


def quality(
    base: Sequence[TokenScores],
    candidate: Sequence[TokenScores],
    answers_base: Sequence[Sequence[int]],
    answers_candidate: Sequence[Sequence[int]],
) -> Quality:
    """Quality over one slice.

    Perplexity is exp(-mean logprob) over all tokens; `rms_delta_p` is the root of the mean squared difference of the
    two models' probabilities of the recorded token.

    Args:
        base: The base's scores, one entry a request.
        candidate: The candidate's scores of the same tokens.
        answers_base: Greedy answers of the base; empty when none were generated.
        answers_candidate: Greedy answers of the candidate to the same prompts.
    """
    logprob_base = np.concatenate([scores.logprob_N for scores in base])
    logprob_candidate = np.concatenate([scores.logprob_N for scores in candidate])
    divergence = np.concatenate([kl_divergence(one, other) for one, other in zip(base, candidate, strict=True)])
    same_top = np.concatenate(
        [one.top_ids_NK[:, 0] == other.top_ids_NK[:, 0] for one, other in zip(base, candidate, strict=True)]
    )
    perplexity_base, perplexity_candidate = perplexity(base), perplexity(candidate)
    return Quality(
        requests=len(base),
        tokens=logprob_base.shape[0],
        perplexity_base=perplexity_base,
        perplexity_candidate=perplexity_candidate,
        perplexity_ratio=perplexity_candidate / perplexity_base,
        kl_divergence_mean=float(divergence.mean()),
        kl_divergence_median=float(np.median(divergence)),
        kl_divergence_p99=float(np.quantile(divergence, 0.99)),
        kl_divergence_max=float(divergence.max()),
        same_top_token_fraction=float(same_top.mean()),
        rms_delta_p=float(np.sqrt(np.mean((np.exp(logprob_candidate) - np.exp(logprob_base)) ** 2))),
        answers=len(answers_base),
        loop_fraction_base=_fraction(answers_base),
        loop_fraction_candidate=_fraction(answers_candidate),
        same_answer_fraction=(
            sum(list(one) == list(other) for one, other in zip(answers_base, answers_candidate, strict=True))
            / len(answers_base)
            if answers_base
            else None
        ),
    )


def _fraction(answers: Sequence[Sequence[int]]) -> float | None:
    return sum(loops(answer) for answer in answers) / len(answers) if answers else None
