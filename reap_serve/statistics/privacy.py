"""Keeps small slices out of files: sums over few tokens say too much of them.

Expert choices of single tokens give the text back (arXiv 2602.04105 reconstructs 91 % of tokens from expert ids), so no
file holds anything per token, and sums over a handful of tokens come close to that.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

from reap_serve.statistics.merge import select_slices
from reap_serve.statistics.record import Statistics, Window, zeros

MINIMUM_TOKENS_PER_SLICE = 1000
# Whose name tells nothing.
NO_SLICE = "default"


def withhold_small_slices(statistics: Statistics, minimum_tokens: int) -> tuple[Statistics | None, Statistics | None]:
    """Divides statistics into the slices that may be written and those that may not yet.

    The withheld part gets a window of its own, with the requests left to the first part: both can be written at
    different times and merged.

    Returns:
        Slices of at least `minimum_tokens` tokens, and the others that hold any; None where there is none. Statistics
        without a token that are incomplete wait, too: the next file says so.
    """
    counted = list(zip(statistics.header.slices, _tokens_per_slice(statistics), strict=True))
    large = [name for name, tokens in counted if tokens >= max(minimum_tokens, 1)]
    small = [name for name, tokens in counted if 0 < tokens < minimum_tokens]
    if not large:
        waits = small or not all(window.complete for window in statistics.header.windows)
        return None, (statistics if waits else None)
    if not small:
        return statistics, None
    withheld = select_slices(statistics, small)
    header = withheld.header.model_copy(update={"windows": (_remainder(statistics.header.windows),)})
    return select_slices(statistics, large), replace(withheld, header=header)


def without_tokens(statistics: Statistics) -> Statistics:
    """Statistics that only tell when these were made and whether they are complete."""
    window = _remainder(statistics.header.windows)
    header = statistics.header.model_copy(update={"slices": (NO_SLICE,), "windows": (window,), "traffic": {}})
    fields = statistics.fields_by_name()
    return Statistics.from_fields(header, {name: zeros(name, (1, *fields[name].shape[1:])) for name in fields})


def _tokens_per_slice(statistics: Statistics) -> list[int]:
    """Tokens of each slice; a rank that counts no layer's tokens has had at least its routed tokens / top_k."""
    routed_SL = statistics.sums.token_count_SPLE.sum(axis=(1, 3))
    least_S = -(-routed_SL.max(axis=1) // max(statistics.header.model.top_k, 1))
    return [max(tokens, int(least)) for tokens, least in zip(statistics.tokens_per_slice(), least_S, strict=True)]


def _remainder(windows: tuple[Window, ...]) -> Window:
    return windows[0].model_copy(
        update={
            "id": uuid.uuid4().hex,
            "started": min(window.started for window in windows),
            "ended": max(window.ended for window in windows),
            "requests": 0,
            "prompt_tokens_total": 0,
            "prompt_tokens_computed": 0,
            "sample_fraction": min(window.sample_fraction for window in windows),
            "complete": all(window.complete for window in windows),
        }
    )
