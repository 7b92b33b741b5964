"""What the tests of servers serve and compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_TOKENS = 12
SETTINGS = {"minimum_tokens": 1, "metrics_seconds": 0.5, "drift_fraction": 1.0}


@dataclass(frozen=True)
class Material:
    """What the tests serve and compare.

    Attributes:
        model: The base.
        plans: Plan files by name.
        pruned: The checkpoints that they make.
        prompts: User messages.
        answers: Stock vLLM's greedy answers by `base` and the plans' names.
    """

    model: Path
    plans: dict[str, Path]
    pruned: dict[str, Path]
    prompts: list[str]
    answers: dict[str, list[str]]
