"""Tells schedulers and alerts how a cycle ended: node_exporter's textfile, or a Pushgateway."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import TYPE_CHECKING

from reap_serve.cycle.config import MetricsSection
from reap_serve.cycle.state import Decision, State

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

DECISIONS = ("nothing", "candidate", "refused")


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

    def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"reap_serve_cycle_{name}", text, labels, registry=registry)

    last_run = gauge("last_run_timestamp_seconds", "When the last cycle ended, well or not.")
    last_run.set_to_current_time()
    gauge("failed", "Whether the last cycle failed before a decision.").set(failed)
    outcome = gauge("decision", "1 for the last decision.", ("decision",))
    for name in DECISIONS:
        outcome.labels(name).set(decision is not None and decision.decision == name)
    waiting = [found for _, found in state.decided() if found.decision == "candidate"]
    if waiting:
        made = datetime.fromisoformat(waiting[0].provenance.created).timestamp()
        gauge("candidate_timestamp_seconds", "When the newest candidate was ready.").set(made)
    if decision is not None and decision.regained:
        regained = gauge("regained_kl_nats", "Mean KL divergence that the new plan takes back, by slice.", ("slice",))
        for name, value in decision.regained.items():
            regained.labels(name).set(value)
    return registry
