"""The embedded model, two plans for it, the two checkpoints that they make, and what stock vLLM answers with each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest
from live_server import LiveServer
from served_material import MAX_TOKENS, SETTINGS, Material

from reap_serve.demo.run import demo_files
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import prune

NUM_PROMPTS = 12


def write_plan(path: Path, dropped: Sequence[int], num_layers: int, num_experts: int) -> Path:
    """A plan that drops the same experts, shifted by the layer's index, in every layer."""
    layers = []
    for index in range(num_layers):
        gone = sorted((expert + index) % num_experts for expert in dropped)
        kept = [expert for expert in range(num_experts) if expert not in gone]
        layers.append({"layer": f"model.layers.{index}.mlp.experts", "index": index, "kept": kept, "dropped": gone})
    path.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": layers}))
    return path


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Prunes twice and asks stock vLLM three times."""
    root = tmp_path_factory.mktemp("material")
    files = demo_files()
    config = json.loads((files.model / "config.json").read_text())
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    plans = {
        "a": write_plan(root / "a.json", range(0, experts // 4), layers, experts),
        "b": write_plan(root / "b.json", range(experts // 2, experts), layers, experts),
    }
    options = PruneOptions(MtpChoice.CUT, shard_bytes=1 << 30, jobs=1)
    pruned = {name: root / f"pruned-{name}" for name in plans}
    for name, path in plans.items():
        prune(str(files.model), path, pruned[name], options, overwrite=False)
    with files.heldout("code").open() as lines:
        requests = [json.loads(line) for line in islice(lines, NUM_PROMPTS)]
    prompts = [request["body"]["messages"][0]["content"] for request in requests]
    asked = root / "prompts.json"
    asked.write_text(json.dumps({"texts": prompts, "max_tokens": MAX_TOKENS}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stock_answers.py")), str(asked), str(files.model)]
        + [str(path) for path in pruned.values()],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    by_model = json.loads(done.stdout)
    answers = {"base": by_model[str(files.model)]} | {name: by_model[str(pruned[name])] for name in plans}
    assert answers["base"] != answers["a"] != answers["b"]
    return Material(files.model, plans, pruned, prompts, answers)


@pytest.fixture(scope="module")
def statistics_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's server writes."""
    return tmp_path_factory.mktemp("statistics") / "live"


@pytest.fixture(scope="module")
def server_variables() -> dict[str, str]:
    """Added to the server's environment."""
    return {}


@pytest.fixture(scope="module")
def server(
    material: Material,
    statistics_directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
    server_options: list[str],
    server_variables: dict[str, str],
) -> Iterator[LiveServer]:
    """One server for a module's tests, with both plans loaded."""
    options = [
        "--observe",
        str(statistics_directory),
        "--overhead-budget",
        "none",
        "--flush-seconds",
        "2",
        *server_options,
    ]
    for name, path in material.plans.items():
        options += ["--plan", f"{name}={path}"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    running = LiveServer(material.model, log, options, SETTINGS, variables=server_variables)
    try:
        running.wait()
        yield running
    finally:
        running.stop()
