"""How sure the saliency is, and how sure the choice that follows from it.

Two views of the same sums. Tokens: the spread of single tokens, right when tokens are drawn independently. Batches:
the spread of whole stretches of traffic, which also holds that tokens of one request resemble each other; on chat
traffic its standard error is up to three times that of tokens. Batches are used where there are enough of them.

Axes: L layers with routed experts, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from reap_serve.errors import RequestError
from reap_serve.statistics.record import Floats
from reap_serve.statistics.saliency import CRITERIA, MixedSums, SliceTerm, keep_largest

# With fewer, the batches' own spread is too uncertain: +-1.96 standard errors from 12 batches cover 92 %.
MIN_BATCHES = 12
# Draws per expert: fewer for a large model, whose many experts average them.
MAX_DRAWS = 512
MIN_DRAWS = 16
DRAWN_SALIENCIES = 2**20
MAX_GROWTH = 2**20


def standard_error(terms: Sequence[SliceTerm], criterion: str = "reap") -> Floats:
    """Standard error of a criterion's saliency, axes [L, E].

    A mean over routed tokens is a ratio R = Y / C of sums over the mixture with scales a_s; by the delta method

        Var R = sum_s a_s^2 Q_s / C^2,   Q_s = sum (y - R c)^2

    where the sum runs over the slice's batches (their sums y and c; times W / (W - 1) for W batches) or over its
    tokens (y = g|f| or |f|, c = 1; times C / (C - 1)). `reap` uses batches where an expert has `MIN_BATCHES` of them;
    other criteria know the spread of tokens only. Where weights fix the shares of the slices, Q_s is taken about the
    slice's own mean. For a total, Var = sum_s a_s^2 (sum y^2 - (sum y)^2 / T_s) over the slice's T_s tokens, y = 0 for
    those routed elsewhere.

    Returns:
        NaN below two tokens, and for criteria whose second moment is not recorded (`gate_sum`, `msan`, `asq`; others
        in statistics of releases that did not record it) or that are no estimate (`random`).

    Raises:
        RequestError: There is no such criterion.
    """
    if criterion not in CRITERIA:
        raise RequestError(f"there is no criterion {criterion}", f"use one of: {', '.join(CRITERIA)}")
    moments = _RATIOS.get(criterion) or _TOTALS.get(criterion)
    if moments is None or not {name.removesuffix("_LE") for name in moments} <= set(terms[0].sums.by_name):
        return np.full(terms[0].sums.token_count_LE.shape, np.nan)
    if criterion in _RATIOS:
        by_token_LE = _ratio_error_of_tokens(terms, *moments)
        if criterion != "reap":
            return by_token_LE
        num_batches_LE = np.sum([term.batches.count_LE for term in terms], axis=0)
        return np.where(num_batches_LE >= MIN_BATCHES, _ratio_error_of_batches(terms), by_token_LE)
    return _total_error(terms, *moments)


def is_total(criterion: str) -> bool:
    """Whether a criterion grows with the tokens: a sum over them, and no mean."""
    return criterion in _TOTALS


def expected_instability(saliency_LE: Floats, error_LE: Floats, keep: int | Sequence[int]) -> Floats:
    """Expected fraction of keep/drop decisions that differ on as much traffic again, per layer, axis [L].

    Given an estimate with standard error e, that of as much other traffic lies around it with variance 2 e^2: e^2 for
    where the truth is, e^2 for the other traffic. Such saliencies are drawn with a fixed seed, each layer is
    chosen again, and the experts on the other side are counted; errors of different experts are taken as independent.

    Args:
        saliency_LE: The saliency.
        error_LE: Its standard error. NaN counts as 0: an expert hardly seen stays where it is, which errs on the low
            side.
        keep: Experts kept, of every layer or of each; 1 to E.

    Raises:
        RequestError: `keep` is out of range.
    """
    num_layers, num_experts = saliency_LE.shape
    keep_L = np.broadcast_to(np.asarray(keep, np.int64), num_layers)
    if not ((keep_L >= 1) & (keep_L <= num_experts)).all():
        raise RequestError(f"cannot keep {keep} of {num_experts} experts", f"keep 1 to {num_experts}")
    kept_LE = keep_largest(saliency_LE, keep_L)
    deviation_LE = math.sqrt(2) * np.nan_to_num(error_LE)
    rng = np.random.default_rng(0)
    changed_L = np.zeros(num_layers)
    num_draws = min(MAX_DRAWS, max(MIN_DRAWS, DRAWN_SALIENCIES // saliency_LE.size))
    for _ in range(num_draws):
        again_LE = saliency_LE + deviation_LE * rng.standard_normal(saliency_LE.shape)
        changed_L += (keep_largest(again_LE, keep_L) != kept_LE).mean(axis=1)
    return changed_L / num_draws


def tokens_for_instability(
    saliency_LE: Floats, error_LE: Floats, keep: int | Sequence[int], num_tokens: int, most: float
) -> int | None:
    """Tokens after which the expected instability, averaged over layers, is at most a given one.

    Standard errors shrink with the root of the tokens; the saliency itself is taken to stay.

    Args:
        saliency_LE: The saliency.
        error_LE: Its standard error on `num_tokens` tokens.
        keep: Experts kept.
        num_tokens: Tokens seen.
        most: Instability to reach, above 0.

    Returns:
        To two digits; None when `MAX_GROWTH` times the tokens do not suffice, as with equal saliencies.
    """

    def fraction(growth: float) -> float:
        return float(expected_instability(saliency_LE, error_LE / math.sqrt(growth), keep).mean())

    low, high = 1 / MAX_GROWTH, float(MAX_GROWTH)
    if fraction(high) > most:
        return None
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fraction(middle) <= most else (middle, high)
    return int(float(f"{num_tokens * high:.1e}"))


def _ratio_error_of_tokens(terms: Sequence[SliceTerm], value: str, square: str) -> Floats:
    count_LE = _mixed(terms, lambda sums: sums.token_count_LE)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_LE = _mixed(terms, lambda sums: getattr(sums, value)) / count_LE
        spread_LE = np.zeros_like(count_LE)
        for term in terms:
            y_LE, y_sq_LE, c_LE = getattr(term.sums, value), getattr(term.sums, square), term.sums.token_count_LE
            q_LE = y_sq_LE - 2 * ratio_LE * y_LE + ratio_LE**2 * c_LE
            q_LE -= _fixed_part(terms, y_LE - ratio_LE * c_LE, term.sums.layer_token_count_L[:, None])
            # No tokens have such moments (Cauchy-Schwarz): an import that did not know the squares of this layer.
            unknown_L = (y_sq_LE * c_LE < y_LE**2 * (1 - 1e-9)).any(axis=1)
            spread_LE += term.scale_L[:, None] ** 2 * np.where(unknown_L[:, None], np.nan, np.maximum(q_LE, 0))
        n_LE = np.sum([term.sums.token_count_LE for term in terms], axis=0)
        return np.where(n_LE >= 2, np.sqrt(spread_LE * n_LE / (n_LE - 1)) / count_LE, np.nan)


def _ratio_error_of_batches(terms: Sequence[SliceTerm]) -> Floats:
    count_LE = _mixed(terms, lambda sums: sums.token_count_LE)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_LE = _mixed(terms, lambda sums: sums.weighted_norm_sum_LE) / count_LE
        spread_LE = np.zeros_like(count_LE)
        for term in terms:
            moments = term.batches
            q_LE = moments.weighted_sq_LE - 2 * ratio_LE * moments.cross_LE + ratio_LE**2 * moments.token_sq_LE
            residual_LE = term.sums.weighted_norm_sum_LE - ratio_LE * term.sums.token_count_LE
            q_LE -= _fixed_part(terms, residual_LE, moments.count_LE)
            spread_LE += term.scale_L[:, None] ** 2 * np.maximum(q_LE, 0)
        n_LE = np.sum([term.batches.count_LE for term in terms], axis=0)
        return np.where(n_LE >= 2, np.sqrt(spread_LE * n_LE / (n_LE - 1)) / count_LE, np.nan)


def _fixed_part(terms: Sequence[SliceTerm], residual_LE: Floats, size_LE: Floats) -> Floats:
    """What a slice's residuals owe to its mean: no spread where weights fix the slice's share."""
    if all((term.scale_L == 1).all() for term in terms):
        return np.zeros_like(residual_LE)
    fixed_LE: Floats = residual_LE**2 / np.maximum(size_LE, 1)
    return fixed_LE


def _total_error(terms: Sequence[SliceTerm], value: str, square: str) -> Floats:
    variance_LE = np.zeros_like(terms[0].sums.token_count_LE)
    for term in terms:
        value_LE, num_tokens_L = getattr(term.sums, value), np.maximum(term.sums.layer_token_count_L, 1)
        about_mean_LE = getattr(term.sums, square) - value_LE**2 / num_tokens_L[:, None]
        variance_LE += term.scale_L[:, None] ** 2 * np.maximum(about_mean_LE, 0)
    n_LE = np.sum([term.sums.token_count_LE for term in terms], axis=0)
    return np.where(n_LE >= 2, np.sqrt(variance_LE), np.nan)


def _mixed(terms: Sequence[SliceTerm], take: Callable[[MixedSums], Floats]) -> Floats:
    mixed_LE: Floats = np.sum([take(term.sums) * term.scale_L[:, None] for term in terms], axis=0)
    return mixed_LE


# The sum and the sum of squares of each criterion: of means over routed tokens, and of totals.
_RATIOS: Mapping[str, tuple[str, str]] = {
    "reap": ("weighted_norm_sum_LE", "weighted_norm_sq_sum_LE"),
    "ean_mean": ("norm_sum_LE", "norm_sq_sum_LE"),
}
_TOTALS: Mapping[str, tuple[str, str]] = {
    "frequency": ("token_count_LE", "token_count_LE"),
    "ean_sum": ("norm_sum_LE", "norm_sq_sum_LE"),
    "weighted_ean_sum": ("weighted_norm_sum_LE", "weighted_norm_sq_sum_LE"),
}
