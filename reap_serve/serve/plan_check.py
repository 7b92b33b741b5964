"""A plan against the served model: what `prune` would refuse is no mask either."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.architectures.spec import RoutingLimits
from reap_serve.model import Fingerprint, fingerprint, open_model
from reap_serve.plan.record import Plan, require_layer_names, require_ordered, require_plan_for
from reap_serve.prune.decide import MtpChoice, make_cut
from reap_serve.records import JsonValue
from reap_serve.serve.live_status import PlanEntry, PlanPhase
from reap_serve.shown_text import shown
from reap_serve.slice_name import is_slice_name


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that a server runs.

    Attributes:
        path: Its files.
        fingerprint: Of them.
        limits: Of its router.
        names: Of its modules.
    """

    path: Path
    fingerprint: Fingerprint
    limits: RoutingLimits
    names: TensorNames


def served_model(reference: str) -> ServedModel:
    """Reads the served model's files.

    Raises:
        ReapServeError: They cannot be read, or the family is unknown.
    """
    source = open_model(reference)
    architecture = resolve(source.config)
    names = TensorNames(architecture, architecture.num_layers(source.config))
    return ServedModel(source.path, fingerprint(source), architecture.limits(source.config), names)


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """A plan that fits the model: what the engine has to know of it."""

    entry: PlanEntry
    kept: Mapping[int, tuple[int, ...]]


def check_plan(plan: Plan, model: ServedModel, source: str, phase: PlanPhase = "all") -> CheckedPlan:
    """Checks a plan as `prune` would.

    Args:
        plan: The plan.
        model: The served model.
        source: How to call the plan in an error.
        phase: Which rows it routes.

    Raises:
        PlanError: Its lists contradict each other, or the router could not choose from what it keeps.
        MismatchError: It is for another model.
    """
    require_ordered(plan, source)
    bound = require_plan_for(plan, model.fingerprint, model.limits.moe_layers)
    require_layer_names(plan, model.names)
    cut = make_cut(plan, model.limits, MtpChoice.CUT)
    canonical = json.dumps([[layer, list(ids)] for layer, ids in sorted(cut.kept.items())])
    if phase != "all":
        canonical += phase
    entry = PlanEntry(
        id=hashlib.sha256(canonical.encode()).hexdigest()[:32],
        phase=phase,
        experts_kept=cut.num_kept,
        # JSON cannot carry half of a surrogate pair.
        criterion=shown(plan.criterion),
        bound=bound,
        planned_dropped_gate_mass=planned_gate_mass(plan.summary),
    )
    return CheckedPlan(entry, cut.kept)


def planned_gate_mass(summary: Mapping[str, JsonValue]) -> dict[str, float]:
    """The dropped gate mass that a plan predicts by slice; empty when it predicts none."""
    planned = summary.get("dropped_gate_mass")
    if not isinstance(planned, Mapping):
        return {}
    found = {
        name: float(value) for name, value in planned.items() if isinstance(value, int | float) and 0 <= value <= 1
    }
    return {name: value for name, value in found.items() if is_slice_name(name)}
