"""Chooses the plan of a run: of a fixed size by a criterion, or by `tune` the smallest within limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reap_serve.cycle import steps
from reap_serve.cycle.config import CycleConfig
from reap_serve.plan.record import Plan
from reap_serve.statistics.record import Statistics


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        plan: The plan; None where nothing can go.
        reason: Why nothing can go.
        report: What shows it.
    """

    plan: Plan | None
    reason: str
    report: Path | None


def choose_plan(config: CycleConfig, statistics: Statistics, run: Path, say: Callable[[str], None]) -> Choice:
    """The plan of the run, also written as its plan.json."""
    return Choice(steps.plan_of_size(config, statistics, run), "", None)
