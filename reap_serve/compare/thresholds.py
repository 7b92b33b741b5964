"""Thresholds: `compare --fail-if 'slices.code.quality.kl_divergence_mean>0.05'`.

    PATH COMPARISON NUMBER,  PATH = keys of report.json with dots between,  COMPARISON = > >= < <=

`slices.*` stands for every slice, and `.low` or `.high` behind a figure's name in `intervals` for an end of its
interval. `tasks.gsm8k.recovery_percent<95` is about every metric of that task, `tasks.*` about every task. A figure
that was not measured fails: a threshold that cannot judge must not pass.
"""

from __future__ import annotations

import operator
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Union, get_args, get_origin

from reap_serve.compare.record import Report, TaskReport
from reap_serve.errors import RequestError, ThresholdError
from reap_serve.records import JsonValue, Record

_EXPRESSION = re.compile(r"\s*(?P<path>[^<>=]+?)\s*(?P<sign>[<>]=?)\s*(?P<limit>[-+.\deE]+)\s*")
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_ENDS = {"low": 0, "high": 1}
_WORDS = re.compile(r"[^.]+")


@dataclass(frozen=True, slots=True)
class Threshold:
    """One condition under which a comparison fails.

    Attributes:
        text: As the user wrote it.
        slice: Name of the slice, `*` for each of them; None where the figure is of no slice.
        task: Name of the task, likewise.
        keys: Path to the figure, without `slices` or `tasks` and the name.
        sign: A key of the comparisons.
        limit: What the figure is compared with.
    """

    text: str
    slice: str | None
    task: str | None
    keys: tuple[str, ...]
    sign: str
    limit: float


def parse_thresholds(texts: Sequence[str], slices: Collection[str], option: str = "--fail-if") -> list[Threshold]:
    """Thresholds from their expressions.

    Args:
        texts: As the user wrote them.
        slices: Names of the traffic's slices.
        option: How to call them in an error.

    Raises:
        RequestError: An expression is not of the form, or names what no report has.
    """
    return [_parse(text, slices, option) for text in texts]


def _parse(text: str, slices: Collection[str], option: str) -> Threshold:
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        raise RequestError(f"{option} {text!r} is not PATH>NUMBER", "signs are > >= < <=")
    try:
        limit = float(match["limit"])
    except ValueError:
        raise RequestError(f"{option} {text!r}: {match['limit']} is no number", "give a number") from None
    name, rest = None, match["path"]
    if rest.startswith("tasks."):
        # Which tasks there are is known when the tools have run.
        fields = re.fullmatch(r"tasks\.(.+?)\.(\w+)(\.low|\.high)?", rest)
        if fields is None:
            raise RequestError(f"{option} {text!r} names no figure of a task", "such as tasks.*.recovery_percent<95")
        keys = (fields[2], *((fields[3][1:],) if fields[3] else ()))
        _require_figure(text, keys, option, TaskReport)
        return Threshold(text, None, fields[1], keys, match["sign"], limit)
    if rest.startswith("slices."):
        rest = rest.removeprefix("slices.")
        # A slice's name may hold dots: the longest that fits.
        fitting = [known for known in (*slices, "*") if rest.startswith(f"{known}.")]
        if not fitting:
            raise RequestError(
                f"{option} {text!r} names no slice of the traffic", f"slices are {', '.join(sorted(slices))}, or *"
            )
        name = max(fitting, key=len)
        rest = rest.removeprefix(f"{name}.")
    keys = tuple(_WORDS.findall(rest))
    _require_figure(text, ("slices", "*", *keys) if name is not None else keys, option)
    return Threshold(text, name, None, keys, match["sign"], limit)


def _require_figure(text: str, keys: Sequence[str], option: str, root: type[Record] = Report) -> None:
    """Walks a record's types, so that a wrong name is found before anything is started."""
    kind: object = root
    for position, key in enumerate(keys):
        if isinstance(kind, type) and issubclass(kind, Record):
            field = kind.model_fields.get(key)
            if field is None:
                place = ".".join(keys[:position]) or ("the report" if root is Report else "a task")
                raise RequestError(
                    f"{option} {text!r}: {place} has no {key}", f"it has {', '.join(sorted(kind.model_fields))}"
                )
            kind = _without_none(field.annotation)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif get_origin(kind) is tuple and key in _ENDS:
            kind = get_args(kind)[0]
        else:
            raise RequestError(f"{option} {text!r}: there is nothing below {'.'.join(keys[:position])}", "shorten it")
    if kind not in (int, float):
        raise RequestError(f"{option} {text!r} names no number", "go on to one of its figures")


def _without_none(kind: object) -> object:
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def failures(thresholds: Sequence[Threshold], report: Report) -> list[str]:
    """What fails, one line each with its figure."""
    document = report.model_dump(mode="json")
    lines = []
    for threshold in thresholds:
        for place, value in _figures(threshold, document):
            if value is None:
                lines.append(f"{place} was not measured ({threshold.text})")
            elif COMPARISONS[threshold.sign](value, threshold.limit):
                lines.append(f"{place} is {value:.6g} ({threshold.text})")
    return lines


def require_passed(thresholds: Sequence[Threshold], report: Report) -> None:
    """Raises when a threshold is crossed.

    Raises:
        ThresholdError: With every figure that fails.
    """
    failed = failures(thresholds, report)
    if failed:
        raise ThresholdError(
            f"{len(failed)} of the --fail-if conditions hold: {'; '.join(failed)}", "keep the base, or prune less"
        )


def _figures(threshold: Threshold, document: Mapping[str, JsonValue]) -> Iterator[tuple[str, float | None]]:
    path = ".".join(threshold.keys)
    if threshold.task is not None:
        yield from _task_figures(threshold, document)
        return
    if threshold.slice is None:
        yield path, _figure(document, threshold.keys)
        return
    slices = document["slices"]
    assert isinstance(slices, Mapping)
    for name in sorted(slices) if threshold.slice == "*" else [threshold.slice]:
        yield f"slices.{name}.{path}", _figure(slices.get(name), threshold.keys)


def _task_figures(threshold: Threshold, document: Mapping[str, JsonValue]) -> Iterator[tuple[str, float | None]]:
    tasks = document["tasks"]
    assert isinstance(tasks, list)
    found = [task for task in tasks if isinstance(task, Mapping) and threshold.task in ("*", task["task"])]
    path = ".".join(threshold.keys)
    for task in found:
        yield f"tasks.{task['task']} ({task['metric']}) {path}", _figure(task, threshold.keys)
    if not found:
        yield f"tasks.{threshold.task}.{path}", None


def _figure(value: JsonValue, keys: Sequence[str]) -> float | None:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key in _ENDS:
            value = value[_ENDS[key]]
        else:
            return None
    return float(value) if isinstance(value, int | float) else None
