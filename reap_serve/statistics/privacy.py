"""Keeps small slices out of files: sums over few tokens say too much of them.

Expert choices of single tokens give the text back (arXiv 2602.04105 reconstructs 91 % of tokens from expert ids), so no
file holds anything per token, and sums over a handful of tokens come close to that.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

from reap_serve.statistics.merge import select_slices
from reap_serve.statistics.record import Statistics, Window

MINIMUM_TOKENS_PER_SLICE = 1000


def withhold_small_slices(statistics: Statistics, minimum_tokens: int) -> tuple[Statistics | None, Statistics | None]:
    """Divides statistics into the slices that may be written and those that may not yet.

    The withheld part gets a window of its own, with the requests left to the first part: both can be written at
    different times and merged.

    Returns:
        Slices of at least `minimum_tokens` tokens, and the others that hold any; None where there is none.
    """
    counted = list(zip(statistics.header.slices, statistics.tokens_per_slice(), strict=True))
    large = [name for name, tokens in counted if tokens >= max(minimum_tokens, 1)]
    small = [name for name, tokens in counted if 0 < tokens < minimum_tokens]
    if not small or not large:
        return (statistics if large else None), (statistics if small else None)
    withheld = select_slices(statistics, small)
    header = withheld.header.model_copy(update={"windows": (_remainder(statistics.header.windows),)})
    return select_slices(statistics, large), replace(withheld, header=header)


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
