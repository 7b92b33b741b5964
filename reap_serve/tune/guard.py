"""The guard: whether a plan diverges less than REAP's of the same size by more than the noise of the choosing requests.

Some rule always has the lowest divergence on a few requests. REAP stays unless that is more than chance.

Axes: C requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap_serve.compare.bootstrap import Bootstrap
from reap_serve.tune.record import Difference

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RequestSums:
    """Divergence of the requests of a slice.

    Attributes:
        divergence_C: Sum of KL(base || plan) over each request's scored tokens, nats.
        tokens_C: Scored tokens.
    """

    divergence_C: Floats
    tokens_C: Floats


def difference(plan: Mapping[str, RequestSums], reap: Mapping[str, RequestSums]) -> Difference:
    """KL of a plan less that of REAP's on the same requests, in pairs: mean over the slices, with its 95 % interval.

    With d of each request (its divergence under the plan less that under REAP's), n its tokens, and C_s requests in
    each of S slices, the difference is D = mean of D_s = sum d / sum n. It is one ratio of sums over all requests when
    each weighs 1 / (sum n of its slice), so that `Bootstrap.ratio` gives its interval; before that each slice is moved
    to D, since only what requests of one slice differ by is noise, and its deviations e = d - D_s n are multiplied by

        sqrt((C_s / (C_s - 1)) / (C / (C - 1)))

    which makes the squared error the sum of the slices' own.

    Args:
        plan: Sums by slice.
        reap: Sums of the same requests under REAP's plan.

    Returns:
        The difference; without an interval where a slice has one request alone.
    """
    apart = {name: sums.divergence_C - reap[name].divergence_C for name, sums in plan.items()}
    by_slice = {name: float(apart[name].sum() / sums.tokens_C.sum()) for name, sums in plan.items()}
    mean = float(np.mean(list(by_slice.values())))
    count = sum(len(sums.tokens_C) for sums in plan.values())
    if min(len(sums.tokens_C) for sums in plan.values()) < 2:
        return Difference(kl_divergence_mean=mean, interval=None)
    numerators, weights = [], []
    for name, sums in plan.items():
        own = len(sums.tokens_C)
        scale = math.sqrt(own / (own - 1) * (count - 1) / count)
        deviation_C = apart[name] - by_slice[name] * sums.tokens_C
        total = sums.tokens_C.sum()
        numerators.append((scale * deviation_C + mean * sums.tokens_C) / total)
        weights.append(sums.tokens_C / total)
    interval = Bootstrap(count).ratio(np.concatenate(numerators), np.concatenate(weights))
    return Difference(kl_divergence_mean=mean, interval=interval)


def is_lower(found: Difference | None) -> bool:
    """Whether a plan diverges less than REAP's by more than noise: the whole interval lies below 0."""
    return found is not None and found.interval is not None and found.interval[1] < 0.0
