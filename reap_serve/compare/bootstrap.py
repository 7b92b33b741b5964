"""Confidence intervals over requests: the tokens of one request are not independent, requests are taken to be.

Axes: C requests (clusters), N tokens, R resamples, Q quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Interval = tuple[float, float]

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 20260101
# Numbers held at once while quantiles are resampled.
CHUNK_CELLS = 1 << 22

_NORMAL = NormalDist()


class Bootstrap:
    """Draws requests with replacement, as many as there are; base and candidate of a request stay together.

    The same number of requests gives the same draws in every run.

    Args:
        num_clusters: C, the number of requests.
        resamples: R.
    """

    def __init__(self, num_clusters: int, resamples: int = RESAMPLES) -> None:
        self.num_clusters = num_clusters
        # How often each request stands in each resample.
        times_RC = np.random.default_rng(SEED).multinomial(
            num_clusters, np.full(num_clusters, 1.0 / max(num_clusters, 1)), size=resamples
        )
        self._times_RC = times_RC.astype(np.float64)
        self._end = lower_end(num_clusters)

    def ratio(
        self, numerator_C: Floats, denominator_C: Floats, transform: Callable[[Floats], Floats] = lambda value: value
    ) -> Interval | None:
        """Interval of f(sum of numerators / sum of denominators) for a rising f.

        Bias-corrected and accelerated percentiles of the resamples (Efron 1987, Better bootstrap confidence intervals),
        the acceleration from leaving out one request at a time:

            a = sum d^3 / (6 (sum d^2)^1.5),  d_c = mean of leave-one-out values - value without c

        Args:
            numerator_C: Sum of each request.
            denominator_C: Weight of each request, above 0.
            transform: f, element by element.

        Returns:
            Low and high end; None below two requests.
        """
        if self.num_clusters < 2:
            return None
        value_R = (self._times_RC @ numerator_C) / (self._times_RC @ denominator_C)
        numerator, denominator = numerator_C.sum(), denominator_C.sum()
        without_C = (numerator - numerator_C) / (denominator - denominator_C)
        low, high = np.quantile(value_R, _levels(value_R, numerator / denominator, without_C, self._end))
        return float(transform(np.asarray(low))), float(transform(np.asarray(high)))

    def quantiles(self, values_CN: Sequence[Floats], quantiles: Sequence[float]) -> list[Interval] | None:
        """Intervals of quantiles over the tokens of all requests: percentiles of the resamples.

        Args:
            values_CN: Values of each request's tokens.
            quantiles: Q numbers from 0 to 1.

        Returns:
            Q intervals; None below two requests.
        """
        if self.num_clusters < 2:
            return None
        values_N = np.concatenate(values_CN)
        order_N = np.argsort(values_N, kind="stable")
        cluster_N = np.repeat(np.arange(self.num_clusters), [len(values) for values in values_CN])[order_N]
        sorted_N = values_N[order_N]
        found_RQ = np.empty((len(self._times_RC), len(quantiles)))
        step = max(1, CHUNK_CELLS // max(len(sorted_N), 1))
        for first in range(0, len(self._times_RC), step):
            below_RN = np.cumsum(self._times_RC[first : first + step][:, cluster_N], axis=1)
            for row, below_N in enumerate(below_RN):
                places_Q = np.searchsorted(below_N, np.asarray(quantiles) * (below_N[-1] - 1), side="right")
                found_RQ[first + row] = sorted_N[np.minimum(places_Q, len(sorted_N) - 1)]
        tail = _NORMAL.cdf(self._end)
        low_Q, high_Q = np.quantile(found_RQ, (tail, 1.0 - tail), axis=0)
        return list(zip(low_Q.tolist(), high_Q.tolist(), strict=True))


def lower_end(num_clusters: int) -> float:
    """The normal quantile at which an interval begins, for C requests: that of a t distribution, and a bit more.

    Resamples of C values vary by (C - 1) / C less than samples of C do, and a normal quantile takes their spread for
    known. Expanded percentiles (Hesterberg 2015, What teachers should know about the bootstrap) mend both:

        -sqrt(C / (C - 1)) t(C - 1),  t(n) = z + (z^3 + z) / 4n + (5 z^5 + 16 z^3 + 3 z) / 96 n^2

    with the quantile of t in Peiser's expansion (Abramowitz and Stegun 26.7.5). Below three requests it is that of two.
    """
    freedom = max(num_clusters - 1, 1)
    z = _NORMAL.inv_cdf(0.5 + CONFIDENCE / 2.0)
    t = z + (z**3 + z) / (4.0 * freedom) + (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / (96.0 * freedom**2)
    return -math.sqrt((freedom + 1.0) / freedom) * t


def _levels(value_R: Floats, value: float, without_C: Floats, end: float) -> Interval:
    """Which quantiles of the resamples are the ends of the interval; `end` is the normal quantile of the lower one."""
    below = (np.count_nonzero(value_R < value) + np.count_nonzero(value_R <= value)) / (2.0 * len(value_R))
    half = 0.5 / len(value_R)
    bias = _NORMAL.inv_cdf(min(max(below, half), 1.0 - half))
    apart_C = without_C.mean() - without_C
    spread = float((apart_C**2).sum())
    acceleration = float((apart_C**3).sum()) / (6.0 * spread**1.5) if spread > 0.0 else 0.0
    return _corrected(bias, acceleration, end), _corrected(bias, acceleration, -end)


def _corrected(bias: float, acceleration: float, end: float) -> float:
    return _NORMAL.cdf(bias + (bias + end) / (1.0 - acceleration * (bias + end)))


def share_interval(count: int, total: int) -> Interval | None:
    """Wilson's interval of a share of requests (Wilson 1927): a bootstrap of 0 out of 32 would be sure of 0.

        (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
        count: Requests with the property.
        total: n.

    Returns:
        Low and high end; None of no requests.
    """
    if total == 0:
        return None
    z = _NORMAL.inv_cdf(0.5 + CONFIDENCE / 2.0)
    share = count / total
    middle = share + z * z / (2 * total)
    width = z * math.sqrt(share * (1.0 - share) / total + z * z / (4 * total * total))
    scale = 1.0 + z * z / total
    return max((middle - width) / scale, 0.0), min((middle + width) / scale, 1.0)
