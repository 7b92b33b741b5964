"""The documented drift alert on a server of a pruned checkpoint: silent on the plan's traffic, raised by another's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_server import KEY, LiveServer
from prometheus_client.parser import text_string_to_metric_families

from reap_serve.demo.run import demo_files
from reap_serve.monitor.metrics import DRIFT_EXCESS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

METRICS_SECONDS = 0.5


def reap_serve(*arguments: str) -> None:
    """One of our commands."""
    done = subprocess.run(
        [sys.executable, "-m", "reap_serve", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "ENDPOINT_KEY": KEY},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def gauges(server: LiveServer) -> tuple[float, float]:
    """Dropped gate mass as it is measured now, and as the plan predicted it."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("slice") == "default"
    }
    prefix = "reap_serve_dropped_gate_mass"
    return found[f"{prefix}_fraction"], found[f"{prefix}_planned_fraction"]


def test_the_gauge_leaves_its_band_when_the_traffic_moves(tmp_path: Path) -> None:
    files = demo_files()
    statistics, plan, pruned = tmp_path / "code.stats", tmp_path / "plan.json", tmp_path / "pruned"
    calibration = f"code={files.model.parent / 'traffic' / 'code.calibration.jsonl'}"
    reap_serve("observe", str(files.model), "--slice", calibration, "--output", str(statistics))
    reap_serve("plan", str(statistics), "--keep-fraction", "0.5", "--output", str(plan))
    reap_serve("prune", str(files.model), str(plan), str(pruned))
    settings = {"metrics_seconds": METRICS_SECONDS, "drift_fraction": 1.0}
    server = LiveServer(pruned, tmp_path / "log", ["--enforce-eager"], settings)
    excess = {}
    try:
        server.wait()
        for domain in ("code", "german"):
            traffic = str(files.heldout(domain))
            where = ("--url", server.url, "--api-key-env", "ENDPOINT_KEY", "--concurrency", "16")
            reap_serve("replay", traffic, *where, "--max-output-tokens", "48")
            # A call of ours reads the engine and sets the metrics.
            server.status()
            measured, planned = gauges(server)
            excess[domain] = measured - planned
    finally:
        server.stop()
    assert abs(excess["code"]) < DRIFT_EXCESS < excess["german"]
