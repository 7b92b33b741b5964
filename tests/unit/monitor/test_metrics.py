"""Metrics: one table, no series by expert, counters that never go back, and files that several servers share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from reap_serve.monitor.metrics import TABLE, Exporter, Reading
from reap_serve.serve.live_status import (
    GateMassReport,
    LayerBalance,
    MaskReport,
    PlanEntry,
    RankStatus,
    SliceLimits,
    WriterReport,
)

ENTRY = PlanEntry(
    id="id-a",
    experts_kept=2,
    criterion="reap",
    bound=True,
    planned_dropped_gate_mass={"code": 0.2, "prose": 0.3},
)


def rank(tokens: int = 100, **changes: object) -> RankStatus:
    """A rank of a server with two plans."""
    values: dict[str, object] = {
        "recording": True,
        "recorder": "deferred",
        "complete": True,
        "failures": 0,
        "tokens_observed": tokens,
        "tokens_masked": 7,
        "sample_fraction": 0.5,
        "recorder_seconds": 2.0,
        "busy_seconds": 100.0,
        "slices": {"default": tokens},
        "slice_limits": SliceLimits(max_slices=16, known=("default",), allowed=(), beyond={}),
        "layers": (),
        "weights_bytes": 4096,
        "writer": WriterReport(
            directory="/d",
            age_seconds=12.0,
            files_written=3,
            tokens_written=90,
            tokens_pending=10,
            write_failures=1,
            last_error=None,
        ),
        "mask": MaskReport(refusal=None, plans={"a": ENTRY, "b": ENTRY.model_copy(update={"id": "id-b"})}, default="a"),
        "gate_mass": GateMassReport(
            pruned=False, refusal=None, served={}, plans={"id-a": {"code": 0.25, "new": 0.4}, "id-b": {}}
        ),
    }
    return RankStatus(**{**values, **changes})  # type: ignore[arg-type]


LAYERS = (
    LayerBalance(layer=0, routed_tokens=200, num_experts=4, unseen=1, load_balance=0.5),
    LayerBalance(layer=1, routed_tokens=0, num_experts=4, unseen=4, load_balance=None),
)


def reading(*ranks: RankStatus) -> Reading:
    """A reading of some ranks."""
    return Reading(ranks, LAYERS, 5000, {}, ("0.1.0", "0.32.0", "model"))


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a scrape, without the times of creation."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def exported(*readings: Reading) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """A scrape after some readings."""
    registry = CollectorRegistry()
    exporter = Exporter(registry)
    for each in readings:
        exporter.export(each)
    return samples(registry)


def test_every_metric_by_hand() -> None:
    found = exported(reading(rank()))
    plain = {name: value for (name, labels), value in found.items() if not labels}
    assert plain == {
        "reap_serve_recording": 1,
        "reap_serve_tokens_observed_total": 100,
        "reap_serve_tokens_masked_total": 7,
        "reap_serve_sample_fraction": 0.5,
        "reap_serve_recorder_overhead_fraction": 0.02,
        "reap_serve_recorder_seconds_total": 2,
        "reap_serve_busy_seconds_total": 100,
        "reap_serve_recorder_failures_total": 0,
        "reap_serve_statistics_incomplete": 0,
        "reap_serve_flush_age_seconds": 12,
        "reap_serve_files_written_total": 3,
        "reap_serve_flush_failures_total": 1,
        "reap_serve_tokens_pending": 10,
        "reap_serve_experts_unseen": 5,
        "reap_serve_load_balance_jain": 0.5,
        "reap_serve_weights_bytes": 4096,
        "reap_serve_kv_cache_capacity_tokens": 5000,
    }
    assert {key: value for key, value in found.items() if key[1]} == {
        ("reap_serve_plan_active", (("plan", "a"),)): 1,
        ("reap_serve_plan_active", (("plan", "b"),)): 0,
        ("reap_serve_dropped_gate_mass_fraction", (("plan", "a"), ("slice", "code"))): 0.25,
        ("reap_serve_dropped_gate_mass_fraction", (("plan", "a"), ("slice", "new"))): 0.4,
        ("reap_serve_dropped_gate_mass_planned_fraction", (("plan", "a"), ("slice", "code"))): 0.2,
        ("reap_serve_dropped_gate_mass_planned_fraction", (("plan", "a"), ("slice", "new"))): 0.3,
        ("reap_serve_build_info", (("model", "model"), ("version", "0.1.0"), ("vllm", "0.32.0"))): 1,
    }


def test_a_pruned_checkpoint_is_compared_with_its_own_plan() -> None:
    served = GateMassReport(pruned=True, refusal=None, served={"default": 0.3}, plans={})
    found = exported(Reading((rank(gate_mass=served),), LAYERS, None, {"code": 0.1}, ("0", "0", "m")))
    key = (("plan", ""), ("slice", "default"))
    assert found["reap_serve_dropped_gate_mass_fraction", key] == 0.3
    assert found["reap_serve_dropped_gate_mass_planned_fraction", key] == 0.1


def test_counters_add_up_over_readings_and_never_go_back() -> None:
    found = exported(reading(rank(100)), reading(rank(160)), reading(rank(150)), reading(rank(170)))
    assert found["reap_serve_tokens_observed_total", ()] == 170


def test_ranks_add_up_where_they_differ_and_not_where_they_repeat() -> None:
    found = exported(reading(rank(), rank(writer=None, complete=False, failures=2)))
    assert found["reap_serve_tokens_observed_total", ()] == 100
    assert found["reap_serve_recorder_failures_total", ()] == 2
    assert found["reap_serve_statistics_incomplete", ()] == 1
    assert found["reap_serve_weights_bytes", ()] == 8192
    assert found["reap_serve_files_written_total", ()] == 3


def test_no_label_names_an_expert_or_a_layer() -> None:
    assert {label for metric in TABLE for label in metric.labels} == {"plan", "slice", "version", "vllm", "model"}
    assert all(metric.name.startswith("reap_serve_") for metric in TABLE)


SERVER = """
import sys
sys.path.insert(0, {tests!r})
from test_metrics import rank, reading
from reap_serve.monitor.metrics import Exporter
from prometheus_client import REGISTRY
if {leads}:
    Exporter(REGISTRY).export(reading(rank({tokens})))
"""


def test_it_is_right_under_several_api_servers(tmp_path: Path) -> None:
    """Each server is a process that shares its metrics by files; only the first one exports."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for leads, tokens in ((True, 100), (False, 0)):
        code = SERVER.format(tests=str(Path(__file__).parent), leads=leads, tokens=tokens)
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    code = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    scrape = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    lines = scrape.stdout.splitlines()
    assert "reap_serve_tokens_observed_total 100.0" in lines
    assert "reap_serve_recording 1.0" in lines
    assert 'reap_serve_dropped_gate_mass_fraction{plan="a",slice="code"} 0.25' in lines
