"""What a model says of given tokens: log-probabilities of each, and the likeliest tokens in its place.

Axes: N tokens, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap_serve.errors import EngineError
from reap_serve.records import JsonValue

TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model says of given tokens, N of them, natural logarithms.

    Attributes:
        token_ids_N: The tokens that are there.
        logprob_N: Of the token that is there.
        top_ids_NK: The K tokens that the model finds likeliest, best first; -1 fills rows with fewer.
        top_logprobs_NK: Theirs; -inf fills.
    """

    token_ids_N: npt.NDArray[np.int64]
    logprob_N: npt.NDArray[np.float64]
    top_ids_NK: npt.NDArray[np.int64]
    top_logprobs_NK: npt.NDArray[np.float64]


def token_scores(token_ids: Sequence[int], rows: Sequence[JsonValue]) -> TokenScores:
    """Scores from vLLM's `prompt_logprobs`: for each token, `{token id: {"logprob", "rank"}}`.

    A row holds the K likeliest tokens and the token that is there, whatever its rank.

    Args:
        token_ids: The tokens that are there, N.
        rows: Their rows, N.

    Raises:
        EngineError: A row is not of this form, or does not hold the token that is there.
    """
    logprob_N = np.full(len(rows), -np.inf)
    top_ids_NK = np.full((len(rows), TOP_LOGPROBS), -1, np.int64)
    top_logprobs_NK = np.full((len(rows), TOP_LOGPROBS), -np.inf)
    for position, (token, row) in enumerate(zip(token_ids, rows, strict=True)):
        entries = _entries(row)
        if token not in entries:
            raise EngineError(
                f"the endpoint's prompt_logprobs leave out token {position} of {len(rows)}",
                "give the URL of an OpenAI endpoint of vLLM",
            )
        logprob_N[position] = entries[token][0]
        for token_id, (logprob, rank) in entries.items():
            if 1 <= rank <= TOP_LOGPROBS:
                top_ids_NK[position, rank - 1], top_logprobs_NK[position, rank - 1] = token_id, logprob
    return TokenScores(np.asarray(token_ids, np.int64), logprob_N, top_ids_NK, top_logprobs_NK)


def _entries(row: JsonValue) -> dict[int, tuple[float, int]]:
    entries: dict[int, tuple[float, int]] = {}
    try:
        if not isinstance(row, Mapping):
            raise TypeError
        for text, entry in row.items():
            if not isinstance(entry, Mapping):
                raise TypeError
            logprob, rank = entry["logprob"], entry["rank"]
            if not isinstance(logprob, int | float) or not isinstance(rank, int):
                raise TypeError
            entries[int(text)] = (float(logprob), rank)
    except (TypeError, KeyError, ValueError):
        raise EngineError(
            "the endpoint's prompt_logprobs are not those of vLLM", "give the URL of an OpenAI endpoint of vLLM"
        ) from None
    return entries
