"""`reap-serve observe` refuses what the installed vLLM routes wrongly, and measures it right with the patches applied.

Each line is the very command, in a process of its own; the oracle is transformers in float32.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("vllm")

import transformers_oracle as oracle
from family_checkpoint import build
from patched_vllm import RELEASE, patched_package
from tiny_families import FAMILIES, NUM_EXPERTS

from reap_serve.statistics.file import read_statistics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
NAMED = {
    "ernie4_5_moe": ["0001-cpu-router-scores"],
    "minimax_m2": ["0001-cpu-router-scores"],
    "laguna": ["0001-cpu-router-scores", "0005-laguna-correction-bias"],
}
ENGINE = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 64, "max_num_seqs": 4}
SLICES = ("code", "prose")


def traffic() -> list[oracle.Served]:
    random = np.random.default_rng(3)
    lengths = [("code", 31), ("prose", 17), ("code", 40)]
    return [oracle.Served(random.integers(3, 200, size=size).tolist(), name, size) for name, size in lengths]


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patched_package(sorted(RELEASE.glob("*.patch")), tmp_path_factory.mktemp("site"))


def observe(model: Path, output: Path, site: Path | None) -> subprocess.CompletedProcess[str]:
    """Runs the command with the `vllm` of `site`, or the installed one."""
    lines = [
        {"prompt": each.token_ids, "max_tokens": 1, "metadata": {"reap_slice": each.slice}, "model": "any"}
        for each in traffic()
    ]
    requests = output.with_name("requests.jsonl")
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "reap_serve", "observe", str(model), str(requests), "--output", str(output)]
    path = [str(ROOT)] if site is None else [str(site), str(ROOT)]
    return subprocess.run(
        [*command, "--engine-args", json.dumps(ENGINE)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", NAMED)
def test_it_is_refused_with_its_patch_and_right_with_it(name: str, tmp_path: Path, patched: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "observed.safetensors"
    build(FAMILIES[name], model, servable=True)
    stock = observe(model, output, None)
    assert stock.returncode == 1
    (line,) = [line for line in stock.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {name} cannot be observed")
    assert re.findall(rf"patches/{RELEASE.name}/([\w-]+)\.patch", line) == NAMED[name]
    assert "Traceback" not in stock.stderr
    assert not output.exists()
    mended = observe(model, output, patched)
    assert mended.returncode == 0, mended.stderr[-3000:]
    observed = read_statistics(str(output))
    expected = oracle.sums(oracle.load(model), traffic(), SLICES, NUM_EXPERTS)
    assert_equal(observed.header.slices, observed.fields_by_name(), expected)


def assert_equal(slices: tuple[str, ...], found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Counts are equal, the sums to a part in ten thousand."""
    order = [slices.index(name) for name in SLICES]
    phases = expected["token_count"].shape[1]
    counts = found["token_count_SPLE"][order]
    np.testing.assert_array_equal(counts[:, :phases], expected["token_count"])
    assert counts[:, :phases].sum() == counts.sum() > 0
    for name in ("gate_sum", "norm_sum", "weighted_norm_sum", "weighted_norm_sq_sum"):
        np.testing.assert_allclose(found[f"{name}_SPLE"][order][:, :phases], expected[name], rtol=1e-4, err_msg=name)
