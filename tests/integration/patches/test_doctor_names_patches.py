"""`reap-serve doctor` names the defects of the installed vLLM with their patches, and none of those once applied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from patched_vllm import RELEASE, patched_package

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
MENDED_BY = {
    "cpu-router-sigmoid": "0001-cpu-router-scores",
    "cpu-router-softmax-bias": "0001-cpu-router-scores",
    "laguna-correction-bias": "0005-laguna-correction-bias",
    "cpu-rotary-heads": "0002-cpu-rope-by-head",
    "cpu-data-parallel-moe": "0006-cpu-data-parallel-moe",
    "cpu-wheel-command": "0003-cpu-wheel-command",
}


def defects(site: str) -> dict[str, str | None]:
    """Patches by defect, as the command tells them of the `vllm` in `site` or of the installed one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (site, str(ROOT))))}
    command = [sys.executable, "-m", "reap_serve", "doctor", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert not run.stderr
    found: Any = json.loads(run.stdout)
    assert found["ok"]
    return {each["name"]: each["patch"] for each in found["defects"]}


def test_stock_and_patched(tmp_path: Path) -> None:
    stock = defects("")
    patched = defects(str(patched_package(sorted(RELEASE.glob("*.patch")), tmp_path)))
    assert {name: patch for name, patch in stock.items() if patch is not None} == {
        name: f"patches/{RELEASE.name}/{patch}.patch" for name, patch in MENDED_BY.items()
    }
    assert patched == {name: patch for name, patch in stock.items() if patch is None}
