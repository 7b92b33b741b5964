"""Why no test runs the Ray executor here: vLLM's platform for CPUs has no Ray resource, and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_vllm_refuses_ray_on_a_cpu_as_the_runbook_says() -> None:
    """Fails when vLLM begins to run Ray on a CPU: the Ray executor can be tested with observation on then."""
    pytest.importorskip("vllm")
    from vllm.platforms.cpu import CpuPlatform

    assert CpuPlatform.ray_device_key == ""
    text = (Path(__file__).parents[3] / "deploy/README.md").read_text()
    assert "current platform cpu does not support ray" in text
