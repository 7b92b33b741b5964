"""Limits of a cycle: what must hold of a report, as for `tune`.

`slices.*.quality.perplexity_ratio<1.05` is judged by the end of its 95 % interval that hurts. Figures that are no
quality of a slice, such as `latency.candidate.latency.itl.p99<0.05`, are judged as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from reap_serve.compare.record import Report
from reap_serve.compare.thresholds import Threshold, failures, parse_thresholds
from reap_serve.tune.limits import judge
from reap_serve.tune.limits import parse_limits as parse_slice_limits

_OPPOSITE = {"<=": ">", ">=": "<", "<": ">=", ">": "<="}


@dataclass(frozen=True, slots=True)
class Limits:
    """What must hold.

    Attributes:
        of_slices: Limits on the quality of slices.
        others: Their opposites for all other figures, as `compare --fail-if` takes them.
    """

    of_slices: tuple[Threshold, ...]
    others: tuple[Threshold, ...]

    def __add__(self, more: Limits) -> Limits:
        """Both."""
        return Limits((*self.of_slices, *more.of_slices), (*self.others, *more.others))


def parse_limits(texts: Sequence[str], slices: Collection[str], place: str = "limit") -> Limits:
    """Limits from their expressions.

    Args:
        texts: As the operator wrote them.
        slices: Names of the held-out traffic's slices.
        place: Where they stand, for an error, such as the file and the key.

    Raises:
        RequestError: A limit is not of the form, or names what no report has.
    """
    mine = [text for text in texts if text.strip().startswith("slices.")]
    rest = [text for text in texts if text not in mine]
    # As they are written first: an error shows what stands in the file.
    parse_thresholds(rest, slices, place)
    opposites = parse_thresholds([_opposite(text) for text in rest], slices, place)
    return Limits(parse_slice_limits(mine, slices, place), tuple(opposites))


def broken(limits: Limits, report: Report) -> list[str]:
    """What does not hold, one line each with its figure."""
    found = judge(limits.of_slices, {name: entry.quality for name, entry in report.slices.items()})
    lines = []
    for result in found:
        if not result.held:
            figure = "was not measured" if result.value is None else f"has {result.value:.6g} on {result.slice}"
            lines.append(f"{result.limit} {figure}")
    return [*lines, *failures(limits.others, report)]


def _opposite(text: str) -> str:
    for sign, opposite in _OPPOSITE.items():
        path, found, number = text.partition(sign)
        if found:
            return f"{path}{opposite}{number}"
    raise ValueError(f"{text!r} has no sign")
