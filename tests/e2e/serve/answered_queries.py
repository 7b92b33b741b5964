"""The queries that a Prometheus server is to answer of a live server's metrics."""

from __future__ import annotations

import json
from pathlib import Path

QUERIES = (
    "rate(reap_serve_tokens_observed_total[1m])",
    "rate(reap_serve_recorder_seconds_total[1m]) / rate(reap_serve_busy_seconds_total[1m])",
    "reap_serve_flush_age_seconds",
    "reap_serve_dropped_gate_mass_fraction",
    "reap_serve_plan_active",
    "reap_serve_build_info",
)


def dashboard_queries() -> list[str]:
    """The dashboard's queries of this server's metrics: recorded ones, a cycle's and what no plan predicts left out."""
    panels = json.loads((Path(__file__).parents[3] / "deploy" / "grafana" / "reap-serve.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [
        query
        for query in queries
        if "reap_serve_" in query
        and not query.startswith("role:")
        and not any(name in query for name in ("planned_fraction", "reap_serve_cycle_"))
    ]
