"""`moe_sum` on vLLM's Triton experts, which Triton's own interpreter runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton", reason="Triton is not installed: the kernel cannot be interpreted")

CALLS = ("one token", "many", "expert parallel")


@pytest.fixture(scope="module")
def calls() -> dict[str, dict[str, list[list[float]]]]:
    script = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, list[list[float]]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("call", CALLS)
def test_what_the_kernel_is_about_to_add_is_summed(calls: dict[str, dict[str, list[list[float]]]], call: str) -> None:
    """Counts and gates exactly, norms to float32; the rows of other ranks' experts, never written, count nothing."""
    found, wanted = calls[call]["found"], calls[call]["wanted"]
    assert [each[0] for each in found] == [each[0] for each in wanted]
    assert sum(each[0] for each in wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    # The output is the kernel's: the recorder changed nothing.
    assert calls[call]["output_error"] < 1e-4
