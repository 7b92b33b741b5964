"""Engines of several ranks on a CPU: a process of its own each, with what vLLM lacks there put in its place.

The patched vLLM comes first on the path (data parallelism needs `0006-cpu-data-parallel-moe`), and a plugin brings
experts that respect the expert map (see `laboratory.plain_experts`). The installed vLLM is only read.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LABORATORY = Path(__file__).with_name("laboratory")
PATCH = "0006-cpu-data-parallel-moe.patch"
ENTRY_POINTS = "[vllm.general_plugins]\nreap_laboratory = plain_experts:register\n"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ENGINE: Mapping[str, object] = {
    "max_model_len": 512,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
    "disable_log_stats": True,
}


def make_site(folder: Path) -> Path:
    """A folder for PYTHONPATH: the patched vLLM, and the laboratory as an installed plugin."""
    sys.path.append(str(Path(__file__).parents[2] / "unit" / "patches"))
    from patched_vllm import RELEASE, patched_package

    patched_package([RELEASE / PATCH], folder)
    for file in LABORATORY.glob("*.py"):
        (folder / file.name).symlink_to(file)
    metadata = folder / "reap_laboratory-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: reap-laboratory\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def run_engine(
    site: Path, model: Path, engine: Mapping[str, object], steps: Sequence[Mapping[str, object]], job: Path
) -> list[Any]:
    """Results of the steps, one each; see `laboratory.run_engine`."""
    job.write_text(json.dumps({"model": str(model), "engine": {**ENGINE, **engine}, "steps": list(steps)}))
    ranks = int(str(engine.get("tensor_parallel_size", 1))) * int(str(engine.get("data_parallel_size", 1)))
    cores = sorted(os.sched_getaffinity(0))
    # By itself vLLM gives each rank a NUMA node of its own.
    bound = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    binding = {"VLLM_CPU_OMP_THREADS_BIND": bound} if ranks > 1 else {}
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [sys.executable, str(LABORATORY / "run_engine.py"), str(job)],
        env={**os.environ, **ENVIRONMENT, **binding, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, run.stdout[-3000:] + run.stderr[-6000:]
    found: list[Any] = json.loads(lines[0].removeprefix("RESULTS "))
    return found


def content(reply: str) -> bytes:
    """Bytes of a worker's reply."""
    return base64.b64decode(reply)
