"""`reap-serve tune` as users call it, on the embedded model; with a run that is killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from reap_serve.demo.run import demo_files
from reap_serve.plan.record import read_plan

LIMITS = ("slices.*.quality.perplexity_ratio<1.3", "slices.*.quality.tool_calls_lost<=1")


def some_traffic(directory: Path, per_domain: int) -> Path:
    path = directory / "traffic.jsonl"
    lines = [demo_files().heldout(domain).read_text().splitlines()[:per_domain] for domain in ("code", "tools")]
    path.write_text("".join(f"{line}\n" for line in chain(*lines)))
    return path


def command(traffic: Path, output: Path, *more: str) -> list[str]:
    limits = [word for limit in LIMITS for word in ("--limit", limit)]
    words = [sys.executable, "-m", "reap_serve", "tune", str(demo_files().model), str(traffic), *limits]
    return [*words, "--no-trials", "--answers-per-slice", "4", "-o", str(output), "--json", *more]


def environment() -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_plan_holds(tmp_path: Path) -> None:
    traffic, output = some_traffic(tmp_path, 20), tmp_path / "tuned"
    ledger = tmp_path / ".tuned.tune" / "ledger.jsonl"
    with subprocess.Popen(command(traffic, output), env=environment(), stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 300
        while not (ledger.is_file() and '"selection:' in ledger.read_text()):
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.2)
        first.send_signal(signal.SIGKILL)
    assert not output.exists()
    kept = len(ledger.read_text().splitlines())
    done = subprocess.run(command(traffic, output), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on after" in done.stderr
    assert kept > 1
    report = json.loads(done.stdout)
    assert report["held"]
    assert report["plan"] == str(output / "plan.json")
    assert len(read_plan(output / "plan.json").layers[0].kept) == report["keep_experts"] < 32
    assert {limit["limit"] for limit in report["limits"]} == set(LIMITS)
    assert not ledger.exists()
    assert (output / "report.html").is_file()


def test_wrong_requests_are_refused_before_an_engine_starts(tmp_path: Path) -> None:
    traffic = some_traffic(tmp_path, 5)
    for more, message in (
        (["--limit", "slices.*.quality.speed<1"], "has no speed"),
        (["--budget", "soon"], "is no budget"),
        (["--keep-experts", "1"], "at least 2"),
        (["--engine-args", "[]"], "not a JSON object"),
    ):
        done = subprocess.run(
            command(traffic, tmp_path / "out", *more), env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "out").exists()
