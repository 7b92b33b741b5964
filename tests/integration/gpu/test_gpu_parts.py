"""The parts of `make gpu-check`, one by one: `pytest -m gpu`. Some are rehearsed on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.__main__ import gpu_name, run
from bench.gpu.parts import PARTS, REHEARSAL

ROOT = Path(__file__).parents[3]


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS)
def test_part(part: str) -> None:
    if gpu_name() is None:
        pytest.skip("there is no GPU")
    result = run(part, 600)
    assert result["passed"], json.dumps(result, indent=1)


@pytest.mark.slow
@pytest.mark.parametrize("part", REHEARSAL)
def test_rehearsal(part: str) -> None:
    pytest.importorskip("vllm")
    result = run(part, 300)
    assert result["passed"], json.dumps(result, indent=1)


@pytest.mark.skipif(gpu_name() is not None, reason="there is a GPU")
@pytest.mark.parametrize("command", [["make", "gpu-check"], [sys.executable, "-m", "bench.gpu"]])
def test_without_a_gpu_it_says_so_in_one_line(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = [each for each in done.stderr.splitlines() if not each.startswith("make")]
    assert said == ["error: there is no GPU that PyTorch can use; run it on a machine with one"]
