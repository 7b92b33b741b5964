"""What the user asks of `tune`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reap_serve.errors import RequestError
from reap_serve.plan.limits import ServingTarget
from reap_serve.plan.request import Size
from reap_serve.records import JsonValue
from reap_serve.traffic.request import Request

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_BUDGET = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>s|m|h|tokens|ktokens|Mtokens)")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend; None is no bound.

    Attributes:
        seconds: From the start of the command on, the engine's start and earlier parts of a resumed run included.
        masked_tokens: Tokens computed under masks.
    """

    seconds: float | None = None
    masked_tokens: int | None = None

    def __str__(self) -> str:
        if self.masked_tokens is not None:
            return f"{self.masked_tokens} masked tokens"
        return "none" if self.seconds is None else f"{self.seconds:g} s"


def parse_budget(text: str) -> Budget:
    """The budget in `30m`, `900s`, `1.5h`, `200ktokens` or `none`.

    Raises:
        RequestError: It is of no such form, or nothing.
    """
    if text == "none":
        return Budget()
    match = _BUDGET.fullmatch(text.strip())
    if match is None or float(match["number"]) <= 0:
        raise RequestError(f"--budget {text!r} is no budget", "give such as 30m, 900s, 1.5h, 200ktokens, or none")
    number, unit = float(match["number"]), match["unit"]
    if unit in _UNITS:
        return Budget(seconds=number * _UNITS[unit])
    scale = {"tokens": 1, "ktokens": 1_000, "Mtokens": 1_000_000}[unit]
    return Budget(masked_tokens=math.ceil(number * scale))


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """A whole request: limits, or a size, or both.

    Attributes:
        model: Directory or hub id.
        requests: The traffic, with text and recorded answers.
        output: Directory to write; the state of a run that was stopped lies beside it.
        limits: Expressions over the figures of `compare` that shall hold, see `limits.parse_limits`.
        size: The size of the plan, where the choice alone is tuned; None asks for the smallest within the limits.
        statistics: Statistics files of the model; empty observes the part of the traffic that is for choosing.
        budget: What may be spent.
        trials: Whether randomised trials are made, where the budget allows.
        target: How the pruned model will be served.
        seed: Of the split and of the trials.
        engine_arguments: Of vLLM's engine.
        max_answer_tokens: Longest greedy answer.
        answers_per_slice: Greedy answers in each slice of each part.
        overwrite: Replace an existing output.
    """

    model: str
    requests: Sequence[Request]
    output: Path
    limits: tuple[str, ...] = ()
    size: Size | None = None
    statistics: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)
    trials: bool = True
    target: ServingTarget = field(default_factory=ServingTarget)
    seed: int = 0
    engine_arguments: Mapping[str, JsonValue] = field(default_factory=dict)
    max_answer_tokens: int = 64
    answers_per_slice: int = 16
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.limits and self.size is None:
            raise RequestError(
                "neither a limit nor a size was given",
                "give --limit 'slices.*.quality.perplexity_ratio<1.05', --keep-fraction or --keep-experts",
            )
        if self.size is not None and self.size.target_bytes is not None:
            raise RequestError("tune takes no target in bytes", "give --keep-fraction or --keep-experts")
