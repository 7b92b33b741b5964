"""What evaluation tools write: lm-eval, evalplus and bfcl-eval, each in its own published form.

| tool | file | items |
|---|---|---|
| lm-eval 0.4 | `results_<time>.json`, `results.<task>.<metric>,<filter>` | `samples_<task>_<time>.jsonl` beside it |
| evalplus 0.3 | `*eval_results.json`, `eval.<task id>[]` | in it |
| bfcl-eval | `BFCL_v*_<category>_score.json`, JSON lines, the first a header | those that failed, in it |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reap_serve.errors import InputFileError
from reap_serve.records import JsonValue, read_json_object

_BFCL_NAME = re.compile(r"BFCL_v\d+_(\w+)_score\.json")


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task on one model.

    Attributes:
        tool: `lm-eval`, `evalplus` or `bfcl`.
        task: As the tool calls it.
        metric: Likewise.
        value: As the tool aggregates it.
        num_items: Items that were asked; None where the tool does not say.
        stderr: The tool's standard error of the value; None where it gives none.
        items: Value of each item by its id; None where the tool does not keep them. Only used where the aggregate is
            their mean.
        higher_is_better: Whether a larger value is the better one.
    """

    tool: str
    task: str
    metric: str
    value: float
    num_items: int | None
    stderr: float | None = None
    items: Mapping[str, float] | None = None
    higher_is_better: bool = True


def read_task_results(path: Path) -> tuple[TaskScore, ...]:
    """The scores in a result file of one of the tools, or in all result files below a directory.

    Of several results of the same task and metric the last in the order of the files' names counts.

    Raises:
        InputFileError: There is none, or it cannot be read.
    """
    files = sorted(file for file in path.rglob("*.json") if _is_result(file)) if path.is_dir() else [path]
    found: dict[tuple[str, str, str], TaskScore] = {}
    for file in files:
        for score in _read(file):
            found[score.tool, score.task, score.metric] = score
    if not found:
        raise InputFileError(
            f"{path} holds no result of lm-eval, evalplus or bfcl-eval",
            "give results_*.json, *eval_results.json or BFCL_*_score.json, or their directory",
        )
    return tuple(found[key] for key in sorted(found))


def _is_result(file: Path) -> bool:
    name = file.name
    return name.startswith("results_") or name.endswith("eval_results.json") or bool(_BFCL_NAME.fullmatch(name))


def _read(file: Path) -> list[TaskScore]:
    try:
        category = _BFCL_NAME.fullmatch(file.name)
        if category is not None:
            return [_bfcl(category[1], _json_lines(file))]
        document = read_json_object(file)
        if "results" in document:
            return list(_lm_eval(file, document))
        return list(_evalplus(file, document)) if "eval" in document else []
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise InputFileError(
            f"{file} is not of the form that its tool writes: {type(error).__name__} at {error}", "run the tool again"
        ) from None


def _json_lines(file: Path) -> list[dict[str, JsonValue]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputFileError(f"{file} cannot be read: {error.strerror}", "check the path") from None
    return [json.loads(line) for line in lines if line.strip()]


def _number(value: JsonValue) -> float:
    if isinstance(value, bool | int | float):
        return float(value)
    raise TypeError(f"{type(value).__name__} where a number should be")


def _mapping(value: JsonValue) -> Mapping[str, JsonValue]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{type(value).__name__} where an object should be")
    return value


def _lm_eval(file: Path, document: Mapping[str, JsonValue]) -> Iterable[TaskScore]:
    better = _mapping(document.get("higher_is_better") or {})
    counts = _mapping(document.get("n-samples") or {})
    for task, measured in _mapping(document["results"]).items():
        metrics = _mapping(measured)
        items = _lm_eval_items(file, task)
        count = _mapping(counts.get(task) or {}).get("effective")
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            # "N/A" where the tool could not compute it.
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            higher = _mapping(better.get(task) or {}).get(metric)
            yield TaskScore(
                "lm-eval",
                task,
                key,
                float(value),
                int(_number(count)) if count is not None else None,
                float(stderr) if isinstance(stderr, int | float) else None,
                items.get((metric, chosen)),
                higher is not False,
            )


def _lm_eval_items(file: Path, task: str) -> dict[tuple[str, str], dict[str, float]]:
    """Values by metric and filter, then by document, from the samples that were logged with a result."""
    stamp = file.stem.removeprefix("results_")
    samples = file.with_name(f"samples_{task}_{stamp}.jsonl")
    items: dict[tuple[str, str], dict[str, float]] = {}
    for sample in _json_lines(samples) if samples.is_file() else ():
        for metric in _strings(sample.get("metrics")):
            value = sample.get(metric)
            # Metrics of another kind of value are aggregated by more than a mean.
            if isinstance(value, bool | int | float):
                items.setdefault((metric, str(sample.get("filter"))), {})[str(sample["doc_id"])] = float(value)
    return items


def _strings(value: JsonValue) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, Sequence) else []


def _evalplus(file: Path, document: Mapping[str, JsonValue]) -> Iterable[TaskScore]:
    """pass@1 as the mean over problems of the share of their solutions that pass, on the base tests and on all."""
    base, plus = {}, {}
    for problem, solutions in _mapping(document["eval"]).items():
        assert isinstance(solutions, list)
        statuses = [_mapping(solution) for solution in solutions]
        passed = [status["base_status"] == "pass" for status in statuses]
        base[problem] = sum(passed) / len(passed)
        if all(status.get("plus_status") is not None for status in statuses):
            both = [one and status["plus_status"] == "pass" for one, status in zip(passed, statuses, strict=True)]
            plus[problem] = sum(both) / len(both)
    task = next(iter(base)).partition("/")[0]
    for metric, items in (("pass@1", base), ("pass@1 plus", plus)):
        if len(items) == len(base):
            yield TaskScore("evalplus", task, metric, sum(items.values()) / len(items), len(items), None, items)


def _bfcl(category: str, lines: Sequence[Mapping[str, JsonValue]]) -> TaskScore:
    """The accuracy; the file lists what failed, so that the rest of its total count passed."""
    header = lines[0]
    failed = {str(line["id"]): 0.0 for line in lines[1:]}
    total = int(_number(header["total_count"]))
    # Those that passed have no ids of their own: they are the others of a known number.
    whole = len(failed) == total - int(_number(header["correct_count"]))
    return TaskScore("bfcl", category, "accuracy", _number(header["accuracy"]), total, None, failed if whole else None)
