"""What must hold: figures of `compare`, judged by the end of their interval that hurts.

`slices.*.quality.perplexity_ratio<1.05` holds where the upper end of every slice's interval is below 1.05. A figure
without an interval, such as a count or an end that the expression itself names, is judged as it is. In `slices.*` a
slice that cannot have the figure is passed over: tool calls where none was to be expected.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from reap_serve.compare.record import Quality
from reap_serve.compare.thresholds import COMPARISONS, Threshold, parse_thresholds
from reap_serve.errors import RequestError
from reap_serve.tune.record import LimitResult


def parse_limits(texts: Sequence[str], slices: Collection[str], option: str = "--limit") -> tuple[Threshold, ...]:
    """Limits from their expressions.

    Args:
        texts: As the user wrote them.
        slices: Names of the traffic's slices.
        option: How to call them in an error.

    Raises:
        RequestError: An expression is not of the form, or names no figure of a slice's quality.
    """
    limits = tuple(parse_thresholds(texts, slices, option))
    for limit in limits:
        if limit.slice is None or limit.keys[0] != "quality":
            raise RequestError(
                f"{option} {limit.text!r} names no quality of a slice: tune measures neither latency, memory nor tasks",
                "name such as slices.*.quality.perplexity_ratio",
            )
    return limits


def judge(limits: Sequence[Threshold], slices: Mapping[str, Quality]) -> tuple[LimitResult, ...]:
    """Every limit, judged on measured slices."""
    return tuple(_judge(limit, slices) for limit in limits)


def _judge(limit: Threshold, slices: Mapping[str, Quality]) -> LimitResult:
    compare = COMPARISONS[limit.sign]
    upper = limit.sign.startswith("<")
    worst: tuple[float, str] | None = None
    for name in sorted(slices) if limit.slice == "*" else [limit.slice or ""]:
        value = _end(limit.keys[1:], slices[name], upper=upper)
        if value is not None and (worst is None or (value > worst[0] if upper else value < worst[0])):
            worst = value, name
    if worst is None:
        # A limit that cannot be judged does not hold.
        return LimitResult(limit=limit.text, value=None, held=False)
    return LimitResult(limit=limit.text, value=worst[0], held=compare(worst[0], limit.limit), slice=worst[1])


def _end(keys: Sequence[str], quality: Quality, *, upper: bool) -> float | None:
    if keys[0] == "intervals":
        ends = quality.intervals.get(keys[1])
        return None if ends is None else ends[keys[2] == "high"]
    if len(keys) > 1:
        return None
    value = getattr(quality, keys[0])
    ends = quality.intervals.get(keys[0])
    if ends is not None:
        return ends[1] if upper else ends[0]
    return None if value is None else float(value)


def require_judged(results: Sequence[LimitResult]) -> None:
    """Refuses limits on figures that no slice has.

    Raises:
        RequestError: Names the first.
    """
    for result in results:
        if result.value is None:
            raise RequestError(
                f"--limit {result.limit!r} was not measured on any slice",
                "check the slice, or leave the limit out: the traffic asks for no such answer",
            )
