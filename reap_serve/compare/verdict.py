"""A reading of the figures against stated limits, so that a report begins with a sentence.

The limits are a convention of this report, not a law: `--fail-if` sets your own. Each figure is judged by its 95 %
interval: `beyond` when the whole interval exceeds the limit, `within` when none of it does, `unclear` in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from reap_serve.compare.record import Quality, Report

Level = Literal["within", "unclear", "beyond"]
Ends = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit.

    Attributes:
        name: The figure of `Quality` that is judged; of a pair, without `_base` and `_candidate`.
        figure: What is judged, for people.
        limit: The largest value that is within.
        unit: How to write it, a format of Python.
        ends: The figure and its interval in a slice; None where it was not measured.
    """

    name: str
    figure: str
    limit: float
    unit: str
    ends: Callable[[Quality], tuple[float, Ends] | None]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One figure against its limit.

    Attributes:
        limit: Which.
        value: The figure.
        ends: Its interval.
        level: The reading.
    """

    limit: Limit
    value: float
    ends: Ends
    level: Level

    def __str__(self) -> str:
        form = self.limit.unit
        low, high = self.ends
        return f"{self.limit.figure} {self.value:{form}} [{low:{form}}, {high:{form}}], limit {self.limit.limit:{form}}"


@dataclass(frozen=True, slots=True)
class SliceVerdict:
    """A slice: the worst of its figures.

    Attributes:
        level: Of the worst figure.
        judgements: Every figure, the worst first.
    """

    level: Level
    judgements: tuple[Judgement, ...]


def _own(name: str) -> Callable[[Quality], tuple[float, Ends] | None]:
    def ends(quality: Quality) -> tuple[float, Ends] | None:
        value = getattr(quality, name)
        return None if value is None else (value, quality.intervals.get(name, (value, value)))

    return ends


def _rise(worse: str, better: str) -> Callable[[Quality], tuple[float, Ends] | None]:
    """A difference of two shares, with Newcombe's interval (1998, method 10) for shares of equal size.

    Base and candidate answer the same requests; the interval leaves their correlation out and is the wider for it.
    """

    def ends(quality: Quality) -> tuple[float, Ends] | None:
        high_share, low_share = getattr(quality, worse), getattr(quality, better)
        if high_share is None or low_share is None:
            return None
        (low_1, high_1), (low_2, high_2) = quality.intervals[worse], quality.intervals[better]
        difference = high_share - low_share
        down = ((high_share - low_1) ** 2 + (high_2 - low_share) ** 2) ** 0.5
        up = ((high_1 - high_share) ** 2 + (low_share - low_2) ** 2) ** 0.5
        return difference, (difference - down, difference + up)

    return ends


def _rising(name: str, figure: str) -> Limit:
    return Limit(name, f"rise of {figure}", 0.02, ".1%", _rise(f"{name}_candidate", f"{name}_base"))


def _falling(name: str, figure: str) -> Limit:
    return Limit(name, f"loss of {figure}", 0.02, ".1%", _rise(f"{name}_base", f"{name}_candidate"))


LIMITS: tuple[Limit, ...] = (
    Limit("kl_divergence_mean", "KL divergence", 0.10, ".3f", _own("kl_divergence_mean")),
    Limit("perplexity_ratio", "perplexity ratio", 1.10, ".3f", _own("perplexity_ratio")),
    _rising("loop_fraction", "loops"),
    _rising("empty_fraction", "empty answers"),
    _rising("language_switch_fraction", "language switches"),
    _falling("json_valid_fraction", "valid JSON"),
    _falling("tool_call_valid_fraction", "valid tool calls"),
)
_ORDER: tuple[Level, ...] = ("beyond", "unclear", "within")


def judge_slice(quality: Quality) -> SliceVerdict:
    """The reading of one slice.

    Shares of answers are measured on few requests: of them, only what is beyond its limit decides over the slice.
    """
    judgements = []
    for limit in LIMITS:
        found = limit.ends(quality)
        if found is not None:
            value, (low, high) = found
            level: Level = "beyond" if low > limit.limit else "within" if high <= limit.limit else "unclear"
            judgements.append(Judgement(limit, value, (low, high), level))
    judgements.sort(key=lambda judgement: _ORDER.index(judgement.level))
    deciding = [
        judgement.level for judgement in judgements if judgement.level == "beyond" or not _is_share(judgement.limit)
    ]
    return SliceVerdict(worst_level(deciding), tuple(judgements))


def worst_level(levels: Iterable[Level]) -> Level:
    """The worst of some readings; `unclear` of none."""
    return min(levels, key=_ORDER.index, default="unclear")


def _is_share(limit: Limit) -> bool:
    return limit.unit.endswith("%")


def verdict_line(report: Report) -> str:
    """One sentence on the whole report."""
    verdicts = {name: judge_slice(entry.quality) for name, entry in report.slices.items()}
    beyond = [name for name, verdict in verdicts.items() if verdict.level == "beyond"]
    unclear = [name for name, verdict in verdicts.items() if verdict.level == "unclear"]
    total = f"{len(verdicts)} slice{'s' if len(verdicts) > 1 else ''}"
    found = farthest(verdicts)
    if found is not None:
        name, worst = found
        return f"{len(beyond)} of {total} beyond the limits: {', '.join(beyond)}. Farthest: {name}, {worst}."
    if unclear:
        return (
            f"No slice is surely beyond the limits, but {len(unclear)} of {total} cannot be told from these requests: "
            f"{', '.join(unclear)}."
        )
    return f"No slice is beyond the limits: {len(verdicts)} of {total} within."


def farthest(verdicts: Mapping[str, SliceVerdict]) -> tuple[str, Judgement] | None:
    """The slice and the figure that exceed their limit by the largest factor; None where none is beyond."""
    beyond = [
        (name, judgement)
        for name, verdict in verdicts.items()
        for judgement in verdict.judgements
        if judgement.level == "beyond"
    ]
    return max(beyond, key=lambda found: _excess(found[1]), default=None)


def _excess(judgement: Judgement) -> float:
    """How many times its limit a figure is."""
    return judgement.value / judgement.limit.limit
