"""Confidence intervals over requests: the tokens of one request are not independent, requests are taken to be.

Axes: C requests (clusters), N tokens, R resamples, Q quantiles, K sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Interval = tuple[float, float]

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 20260101
# How many times smaller than that of the requests a resample's standard error may be: so many that one event among many
# requests has Poisson's upper end, 5.57 events.
LARGEST_SHRINKAGE = 4.57
# Numbers held at once while quantiles are resampled.
CHUNK_CELLS = 1 << 22


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

        Bootstrap-t (Efron and Tibshirani 1993, An introduction to the bootstrap, 12.5). Where few requests carry
        most of a sum, many resamples miss them, and such a resample has too small a ratio and too small a standard
        error. Quantiles of resampled ratios then end too low. Quantiles of t, the error of a resample's ratio over its
        own standard error, do not. With the ratio r, e = numerator - r denominator of each request, tail p, and a star
        for what a resample gives:

            s^2 = C / (C - 1) sum e^2 / (sum denominator)^2
            t* = (r* - r) / max(s*, s / 4.57)
            interval = r - s t*(1 - p), r - s t*(p)

        The floor s / 4.57 keeps t* finite where a resample has next to no s*. A mean lies among its values, so the
        interval is cut to the range of the requests' own ratios.

        Args:
            numerator_C: Sum of each request.
            denominator_C: Weight of each request, not negative, above 0 in sum.
            transform: f, element by element.

        Returns:
            Low and high end; None below two requests.
        """
        if self.num_clusters < 2:
            return None
        value = float(numerator_C.sum() / denominator_C.sum())
        residual_C = _residuals(numerator_C, denominator_C)
        columns_CK = (residual_C, denominator_C, residual_C**2, residual_C * denominator_C, denominator_C**2)
        apart_R, weight_R, square_R, cross_R, weight_square_R = (self._times_RC @ np.stack(columns_CK, axis=1)).T
        # Without any weight a resample has no ratio.
        kept_R = weight_R > 0.0
        apart_R = apart_R[kept_R] / weight_R[kept_R]
        square_R = square_R[kept_R] - 2.0 * apart_R * cross_R[kept_R] + apart_R**2 * weight_square_R[kept_R]
        scale = math.sqrt(self.num_clusters / (self.num_clusters - 1))
        error = scale * math.sqrt(float((residual_C**2).sum())) / float(denominator_C.sum())
        error_R = scale * np.sqrt(np.maximum(square_R, 0.0)) / weight_R[kept_R]
        ends = np.array((value, value))
        if error > 0.0:
            tail = (1.0 - CONFIDENCE) / 2.0
            low_t, high_t = np.quantile(apart_R / np.maximum(error_R, error / LARGEST_SHRINKAGE), (tail, 1.0 - tail))
            ends = np.clip((value - error * high_t, value - error * low_t), *_range(numerator_C, denominator_C))
        return float(transform(ends[0])), float(transform(ends[1]))

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
        tail = float(special.ndtr(self._end))
        low_Q, high_Q = np.quantile(found_RQ, (tail, 1.0 - tail), axis=0)
        return list(zip(low_Q.tolist(), high_Q.tolist(), strict=True))


def lower_end(num_clusters: int) -> float:
    """The normal quantile at which the interval of C requests begins; it ends at the same number above 0.

    Plain percentiles of resamples are too narrow for few requests, for two reasons: resamples vary less than samples
    do, by (C - 1) / C in variance, and the spread is itself estimated, which asks for t in place of the normal
    distribution. Expanded percentiles (Hesterberg 2015, What teachers should know about the bootstrap) mend both:

        -sqrt(C / (C - 1)) t(C - 1)

    where t(n) is the 97.5 % quantile of the t distribution of n degrees of freedom. Of one request it is that of two.
    """
    freedom = max(num_clusters - 1, 1)
    return -math.sqrt((freedom + 1.0) / freedom) * float(special.stdtrit(freedom, 0.5 + CONFIDENCE / 2.0))


def rests_on_few(numerator_C: Floats, denominator_C: Floats) -> bool:
    """Whether a ratio of sums rests on so few of its requests that its interval may miss more often than it says.

    Cochran's rule (1977, Sampling techniques, 2.15): the interval of a mean of C values of skewness g can be relied on
    if C >= 25 g^2; here g = mean e^3 / (mean e^2)^1.5 with e as in `Bootstrap.ratio`. What no request shows, this
    cannot tell either.

    Args:
        numerator_C: Sum of each request.
        denominator_C: Weight of each request, not negative, above 0 in sum.
    """
    residual_C = _residuals(numerator_C, denominator_C)
    square = float((residual_C**2).mean())
    if square == 0.0:
        return False
    skewness = float((residual_C**3).mean()) / square**1.5
    return bool(len(residual_C) < 25.0 * skewness**2)


def _residuals(numerator_C: Floats, denominator_C: Floats) -> Floats:
    residual_C: Floats = numerator_C - numerator_C.sum() / denominator_C.sum() * denominator_C
    return residual_C


def _range(numerator_C: Floats, denominator_C: Floats) -> Interval:
    """The smallest and the largest of the requests' own ratios; one without weight counts where it has a numerator."""
    with np.errstate(divide="ignore", invalid="ignore"):
        own_C = numerator_C / denominator_C
    return float(np.nanmin(own_C)), float(np.nanmax(own_C))


def share_interval(count: int, total: int) -> Interval | None:
    """Wilson's interval of a share of requests (Wilson 1927): a bootstrap of 0 out of 32 would be sure of 0.

    Args:
        count: Requests with the property.
        total: All requests.

    Returns:
        Low and high end; None of no requests.
    """
    if total == 0:
        return None
    interval = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)
