"""The Grafana dashboard: base and candidate side by side, and the statistics.

`python deploy/grafana/dashboard.py > deploy/grafana/reap-serve.json` writes it. Checked by:
tests/unit/deploy/test_dashboard.py (the file is what this module gives; its queries name only metrics that a server
exposes or a rule records).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Json = dict[str, object]
DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 12, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One time series.

    Attributes:
        title: Above it.
        help: Shown on its corner.
        unit: Grafana's name of the unit.
        queries: PromQL, with the legend of each.
    """

    title: str
    help: str
    unit: str
    queries: Sequence[tuple[str, str]]


ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Quality",
        (
            Panel(
                "Dropped gate mass, measured and planned",
                "Gate weights of the full router on dropped experts. Measured far above planned: the traffic moved.",
                "percentunit",
                (
                    (
                        "max by (role, plan, slice) (reap_serve_dropped_gate_mass_fraction)",
                        "{{role}} {{plan}} {{slice}}",
                    ),
                    (
                        "max by (role, plan, slice) (reap_serve_dropped_gate_mass_planned_fraction)",
                        "{{role}} {{plan}} {{slice}} planned",
                    ),
                ),
            ),
            Panel(
                "Answers that end in repetition or by length",
                "A candidate above base loops or does not find an end.",
                "percentunit",
                (
                    (
                        'role_reason:vllm_request_success:fraction5m{finished_reason=~"repetition|length"}',
                        "{{role}} {{finished_reason}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Latency and load",
        (
            Panel(
                "Time to first token, p95",
                "Of the requests of 5 minutes.",
                "s",
                (("role:vllm_time_to_first_token_seconds:p95", "{{role}}"),),
            ),
            Panel(
                "Time between tokens, p95",
                "Of the tokens of 5 minutes.",
                "s",
                (("role:vllm_inter_token_latency_seconds:p95", "{{role}}"),),
            ),
            Panel(
                "Requests finished, running and waiting",
                "Compare base and candidate under like load only.",
                "short",
                (
                    ("role:vllm_request_success:rate5m", "{{role}} finished a second"),
                    ("sum by (role) (vllm:num_requests_running)", "{{role}} running"),
                    ("sum by (role) (vllm:num_requests_waiting)", "{{role}} waiting"),
                ),
            ),
            Panel("Tokens generated a second", "", "short", (("role:vllm_generation_tokens:rate5m", "{{role}}"),)),
            Panel("Time in the queue, p95", "", "s", (("role:vllm_request_queue_time_seconds:p95", "{{role}}"),)),
            Panel(
                "Preemptions a second",
                "Requests thrown out of a full KV cache.",
                "short",
                (("sum by (role) (rate(vllm:num_preemptions_total[5m]))", "{{role}}"),),
            ),
        ),
    ),
    (
        "Memory",
        (
            Panel(
                "Memory of the weights",
                "What pruning saves.",
                "bytes",
                (("sum by (role) (reap_serve_weights_bytes)", "{{role}}"),),
            ),
            Panel(
                "KV cache: capacity in tokens",
                "What the saved memory buys.",
                "short",
                (("sum by (role) (reap_serve_kv_cache_capacity_tokens)", "{{role}}"),),
            ),
            Panel(
                "KV cache in use",
                "",
                "percentunit",
                (("max by (role) (vllm:kv_cache_usage_perc)", "{{role}}"),),
            ),
        ),
    ),
    (
        "Statistics",
        (
            Panel(
                "Tokens recorded a second",
                "Of requests under a plan nothing is recorded.",
                "short",
                (
                    ("sum by (role) (rate(reap_serve_tokens_observed_total[5m]))", "{{role}} recorded"),
                    ("sum by (role) (rate(reap_serve_tokens_masked_total[5m]))", "{{role}} under a plan"),
                    ("sum by (role) (reap_serve_tokens_pending)", "{{role}} not yet in a file"),
                ),
            ),
            Panel(
                "Cost of recording",
                "Share of the engine's time, and the share of tokens that is recorded for it.",
                "percentunit",
                (
                    ("role:reap_serve_recorder_overhead:fraction5m", "{{role}} time"),
                    ("min by (role) (reap_serve_sample_fraction)", "{{role}} sampled"),
                ),
            ),
            Panel(
                "Age of the last statistics file",
                "",
                "s",
                (("max by (role, instance) (reap_serve_flush_age_seconds)", "{{role}} {{instance}}"),),
            ),
            Panel(
                "Failures and lost tokens",
                "Incomplete statistics say so in their file, too.",
                "short",
                (
                    ("sum by (role) (increase(reap_serve_recorder_failures_total[15m]))", "{{role}} recorder"),
                    ("sum by (role) (increase(reap_serve_flush_failures_total[15m]))", "{{role}} files"),
                    ("max by (role) (reap_serve_statistics_incomplete)", "{{role}} incomplete"),
                ),
            ),
            Panel(
                "Experts without a recorded token",
                "It falls while the statistics fill; what stays is unused by this traffic.",
                "short",
                (("max by (role) (reap_serve_experts_unseen)", "{{role}}"),),
            ),
            Panel(
                "Balance of the experts",
                "Jain's index of the token counts: 1 when all experts are used alike, 1/E when one has all.",
                "short",
                (("avg by (role) (reap_serve_load_balance_jain)", "{{role}}"),),
            ),
        ),
    ),
    (
        "Cycle",
        (
            Panel(
                "Decisions",
                "1 for the last decision of the nightly cycle; failed ends before one.",
                "short",
                (
                    ("max by (instance, decision) (reap_serve_cycle_decision)", "{{instance}} {{decision}}"),
                    ("max by (instance) (reap_serve_cycle_failed)", "{{instance}} failed"),
                ),
            ),
            Panel(
                "Experts kept by the plan in use",
                "What is served, or the candidate that waits.",
                "short",
                (("max by (instance) (reap_serve_cycle_experts_kept)", "{{instance}}"),),
            ),
            Panel(
                "Drift: gate weight on dropped experts above plan",
                "Of the slice that rose most, when the cycle looked.",
                "percentunit",
                (("max by (instance) (reap_serve_cycle_gate_mass_rise_fraction)", "{{instance}}"),),
            ),
            Panel(
                "KL divergence of the last plan as a mask",
                "Mean over the held-out tokens of each slice, in nats; and what it takes back from the plan in use.",
                "short",
                (
                    ("max by (instance, slice) (reap_serve_cycle_trial_kl_nats)", "{{instance}} {{slice}}"),
                    ("max by (instance, slice) (reap_serve_cycle_regained_kl_nats)", "{{instance}} {{slice}} regained"),
                ),
            ),
        ),
    ),
)


def dashboard() -> Json:
    """The dashboard in the JSON that Grafana imports and provisions."""
    return {
        "uid": "reap-serve",
        "title": "reap-serve",
        "tags": ["vllm", "reap-serve"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}]
        },
        "annotations": {"list": []},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[Json]:
    number, top = 0, 0
    for title, panels in ROWS:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _place(top, 0, 24, 1),
        }
        top += 1
        for index, panel in enumerate(panels):
            number += 1
            row, column = divmod(index, 24 // WIDTH)
            yield _panel(number, panel, _place(top + row * HEIGHT, column * WIDTH, WIDTH, HEIGHT))
        top += -(-len(panels) // (24 // WIDTH)) * HEIGHT


def _place(top: int, left: int, width: int, height: int) -> Json:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(number: int, panel: Panel, place: Json) -> Json:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
