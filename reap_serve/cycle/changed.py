"""Has anything changed enough for a new plan?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reap_serve.cycle import steps
from reap_serve.cycle.collect import plan_digest, served_plan
from reap_serve.cycle.config import CycleConfig, DriftSection
from reap_serve.cycle.state import State
from reap_serve.plan.decision import kept_mask
from reap_serve.plan.record import Plan, read_plan
from reap_serve.serve.plan_check import planned_gate_mass
from reap_serve.statistics.drift import dropped_gate_mass
from reap_serve.statistics.merge import select_slices
from reap_serve.statistics.record import Statistics


@dataclass(frozen=True, slots=True)
class PlanInUse:
    """The plan that the traffic is held against.

    Attributes:
        plan: It.
        path: The checkpoint or plan file.
        served: Whether it is served; else it is a candidate that waits for an operator.
        statistics: What it was made from; None where this state did not make it.
    """

    plan: Plan
    path: Path
    served: bool
    statistics: Path | None

    def __str__(self) -> str:
        return f"{'what is served' if self.served else 'the candidate that waits'}, {self.path}"


def plan_in_use(config: CycleConfig, state: State) -> PlanInUse | None:
    """The newest candidate, if it waits or is served; else what is served; None where the base is and nothing waits."""
    served = served_plan(config)
    served_digest = None if served is None else plan_digest(served)
    candidates = [
        (run, Path(decision.candidate))
        for run, decision in state.decided()
        if decision.candidate is not None and (run / steps.PLAN_NAME).exists()
    ]
    for position, (run, checkpoint) in enumerate(candidates):
        plan = read_plan(run / steps.PLAN_NAME)
        is_served = plan_digest(plan) == served_digest
        if is_served or (position == 0 and checkpoint.exists()):
            return PlanInUse(plan, checkpoint, is_served, run / steps.WINDOWS_NAME)
    if served is None or config.served is None:
        return None
    return PlanInUse(served, config.served, True, None)


@dataclass(frozen=True, slots=True)
class Fit:
    """How well the plan in use fits the traffic.

    Attributes:
        gate_mass_rise: How much the dropped share of the gate weight rose over what was planned, on the slice where it
            rose most.
        stays: Why the plan stays in use; None where a new one is wanted.
    """

    gate_mass_rise: float
    stays: str | None


def fit_of(limits: DriftSection, in_use: PlanInUse, statistics: Statistics, run: Path) -> Fit:
    """Whether the plan in use still fits.

    It stays while no slice gives its dropped experts noticeably more gate weight than when it was made, and where a
    new plan would differ by no more than chance. Where its own statistics are not known, chance is not looked at.
    """
    rise, slice_name = _gate_mass_rise(in_use, statistics)
    told = f"the gate weight on dropped experts rose by {rise:.1%} at most (slice {slice_name})"
    if rise <= limits.max_gate_mass_rise:
        return Fit(rise, f"{in_use} fits: {told}, {limits.max_gate_mass_rise:.1%} are allowed")
    if in_use.statistics is None or not in_use.statistics.exists():
        return Fit(rise, None)
    moved = steps.measure_drift(in_use.statistics, statistics, limits.criterion, in_use.plan.num_kept, run)
    if moved.plan_would_change:
        return Fit(rise, None)
    return Fit(
        rise,
        f"{in_use} fits: {told}, and a new plan would differ in {moved.changed_decisions} decisions, "
        f"{moved.by_chance[1]:.0f} by chance alone",
    )


def _gate_mass_rise(in_use: PlanInUse, statistics: Statistics) -> tuple[float, str]:
    """The largest rise of the dropped share of the gate weight over what was planned, and its slice.

    A slice that the plan did not see is held against the mean of those that it saw.
    """
    planned = planned_gate_mass(in_use.plan.summary)
    usual = sum(planned.values()) / len(planned) if planned else 0.0
    kept_LE = kept_mask(in_use.plan, statistics.header.model.num_experts)
    rises = []
    for name in statistics.header.slices:
        mass = dropped_gate_mass(select_slices(statistics, [name]), kept_LE)
        if mass is not None:
            rises.append((mass - planned.get(name, usual), name))
    return max(rises, default=(0.0, "none"))
