"""Older traffic counts less: every sum is weighed by 2^(-age / H), with the half-life H.

The age of an input is counted from the end of the newest input, so that merging depends on the files alone. Sums and
counts take the weight w, second moments of batches w^2 (those of a batch whose tokens count w), maxima none. An aged
file says for which moment it was weighed; merging it later weighs it again by the time between, so aged files merge
like others: in any order and grouping, to rounding.

The number of batches takes the weight once, and so do the squares of single tokens: both make standard errors of aged
statistics larger than they are, never smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from reap_serve.errors import MismatchError, RequestError
from reap_serve.statistics.record import MAX_FIELDS, Ageing, Header
from reap_serve.statistics.windows import ended

# Windows of one file may lie this part of a half-life apart: they get one weight, which then errs by 7 % at most.
MAX_SPREAD = 0.1
_SECOND_MOMENTS = ("batch_weighted_sq_SLE", "batch_cross_SLE", "batch_token_sq_SLE")


@dataclass(frozen=True, slots=True)
class AgeWeights:
    """The weights of some inputs.

    Attributes:
        of_inputs: In their order; 1 for the newest.
        ageing: Of their sum; None where nothing is weighed.
    """

    of_inputs: tuple[float, ...]
    ageing: Ageing | None


def exponent_of(field: str) -> int:
    """The power of the weight that a field takes."""
    if field in MAX_FIELDS:
        return 0
    return 2 if field in _SECOND_MOMENTS else 1


def age_weights(headers: Sequence[Header], names: Sequence[str], half_life: timedelta | None) -> AgeWeights:
    """How inputs are weighed before they are added.

    Args:
        headers: Of the inputs.
        names: Of the inputs, for errors.
        half_life: None adds the inputs as they are; aged ones then have to agree.

    Raises:
        MismatchError: Aged inputs have other half-lives, or meet inputs that are not aged.
        RequestError: The windows of one input lie too far apart for one weight.
    """
    aged = {header.ageing.half_life_seconds: name for header, name in zip(headers, names, strict=True) if header.ageing}
    plain = [name for header, name in zip(headers, names, strict=True) if header.ageing is None]
    if half_life is None and not aged:
        return AgeWeights((1.0,) * len(headers), None)
    if half_life is None and plain:
        raise MismatchError(f"{next(iter(aged.values()))} is weighed by age, {plain[0]} is not", "give --half-life")
    seconds = half_life.total_seconds() if half_life is not None else next(iter(aged))
    other = next((value for value in aged if value != seconds), None)
    if other is not None:
        raise MismatchError(
            f"{aged[other]} has a half-life of {other / 86400:g} days, {seconds / 86400:g} are asked for",
            "merge the files that it was made from",
        )
    moments = [_moment(header, name, seconds) for header, name in zip(headers, names, strict=True)]
    newest = max(moments, default=datetime.now(UTC))
    weights = tuple(2.0 ** (-(newest - moment).total_seconds() / seconds) for moment in moments)
    return AgeWeights(weights, Ageing(half_life_seconds=seconds, as_of=newest.isoformat()))


def _moment(header: Header, name: str, half_life_seconds: float) -> datetime:
    """When an input counts fully."""
    if header.ageing is not None:
        return datetime.fromisoformat(header.ageing.as_of)
    ends = [ended(window) for window in header.windows]
    spread = (max(ends) - min(ends)).total_seconds()
    if spread > MAX_SPREAD * half_life_seconds:
        raise RequestError(
            f"the windows of {name} ended {spread / 86400:.1f} days apart and cannot be weighed one by one",
            "give the files that it was merged from",
        )
    return max(ends)
