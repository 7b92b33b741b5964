"""Tells schedulers and alerts how a cycle ended: node_exporter's textfile, or a Pushgateway."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from reap_serve.cycle.config import MetricsSection
from reap_serve.cycle.state import Decision, State

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

DECISIONS = ("nothing", "candidate", "refused")
PREFIX = "reap_serve_cycle_"
# Every series with its help and labels.
SERIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    f"{PREFIX}last_run_timestamp_seconds": ("When the last cycle ended, well or not.", ()),
    f"{PREFIX}failed": ("Whether the last cycle failed before a decision.", ()),
    f"{PREFIX}decision": ("1 for the last decision.", ("decision",)),
    f"{PREFIX}candidate_timestamp_seconds": ("When the newest candidate was ready; 0 without one.", ()),
    f"{PREFIX}experts_kept": ("Experts a layer that the plan in use, or the chosen one, keeps; 0 without.", ()),
    f"{PREFIX}gate_mass_rise_fraction": ("Rise of the gate weight on dropped experts over plan, worst slice.", ()),
    f"{PREFIX}trial_kl_nats": ("Mean KL divergence of the chosen plan as a mask, by slice.", ("slice",)),
    f"{PREFIX}regained_kl_nats": ("Of it, what the new plan takes back from the plan in use.", ("slice",)),
}


def tell_outcome(section: MetricsSection, state: State, decision: Decision) -> None:
    """Publishes a decision."""
    _tell(section, state, decision, failed=False)


def tell_failure(section: MetricsSection, state: State) -> None:
    """Publishes that a cycle failed; the last decision stays as it was."""
    last = next((decision for _, decision in state.decided()), None)
    with contextlib.suppress(OSError):
        _tell(section, state, last, failed=True)


def _tell(section: MetricsSection, state: State, decision: Decision | None, *, failed: bool) -> None:
    if section.textfile is None and section.pushgateway is None:
        return
    from prometheus_client import push_to_gateway, write_to_textfile

    registry = _registry(state, decision, failed=failed)
    if section.textfile is not None:
        section.textfile.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(section.textfile), registry)
    if section.pushgateway is not None:
        push_to_gateway(section.pushgateway, job=section.job, registry=registry)


def _registry(state: State, decision: Decision | None, *, failed: bool) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry, Gauge

    registry = CollectorRegistry()
    gauges = {name: Gauge(name, text, labels, registry=registry) for name, (text, labels) in SERIES.items()}

    def put(name: str, value: float, *labels: str) -> None:
        gauge = gauges[f"{PREFIX}{name}"]
        (gauge.labels(*labels) if labels else gauge).set(value)

    put("last_run_timestamp_seconds", time.time())
    put("failed", failed)
    for name in DECISIONS:
        put("decision", decision is not None and decision.decision == name, name)
    made = [found.provenance.created for _, found in state.decided() if found.decision == "candidate"]
    put("candidate_timestamp_seconds", datetime.fromisoformat(made[0]).timestamp() if made else 0)
    if decision is not None:
        put("experts_kept", decision.experts_kept or 0)
        put("gate_mass_rise_fraction", decision.gate_mass_rise or 0.0)
        for series, values in (("trial_kl_nats", decision.trial_kl), ("regained_kl_nats", decision.regained)):
            for slice_name, value in (values or {}).items():
                put(series, value, slice_name)
    return registry
