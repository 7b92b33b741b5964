"""`--drop-unsound`: experts whose weights are unsound go first, whatever the criterion says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from statistics_of import statistics

from reap_serve.cli.app import main
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.model_limits import limits_of_statistics
from reap_serve.plan.record import read_plan
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.statistics.file import write_statistics
from reap_serve.statistics.record import Statistics

REAP = [[1.0, 2.0, 3.0, 9.0], [9.0, 3.0, 2.0, 1.0]]
COUNTS = [[10, 10, 10, 10], [10, 10, 10, 10]]


def observed() -> Statistics:
    return statistics({"default": (COUNTS, REAP)})


def kept(unsound: dict[tuple[int, int], str], experts: int = 2) -> list[list[int]]:
    request = PlanRequest(size=Size(keep_experts=experts))
    evidence = gather(observed(), request, limits_of_statistics(observed().header), unsound)
    decision = decide(evidence, request.size)
    return [np.flatnonzero(row).tolist() for row in decision.kept_LE]


def test_the_best_expert_goes_first_when_it_is_unsound() -> None:
    assert kept({}) == [[2, 3], [0, 1]]
    assert kept({(0, 3): "never calibrated", (1, 1): "lacks a scale"}) == [[1, 2], [0, 2]]
    assert kept({(0, 3): "x"}, experts=4) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_what_stays_although_it_is_unsound_is_known() -> None:
    request = PlanRequest(size=Size(keep_experts=3))
    unsound = {(0, 3): "a", (0, 2): "b", (1, 0): "c"}
    evidence = gather(observed(), request, limits_of_statistics(observed().header), unsound)
    decision = decide(evidence, request.size)
    # Two of four are unsound in layer 0, and three stay: the better of the two.
    assert list(evidence.unsound_kept(decision)) == [(0, 3)]


def test_the_command_looks_at_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expert 3 of layer 0 has the largest saliency and a weight in another form than its layer's."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    (model / "config.json").write_text(json.dumps(config))
    tensors = {f"model.layers.{layer}.mlp.gate.weight": np.ones((4, 8), np.float32) for layer in (0, 1)}
    for layer in (0, 1):
        for expert in range(4):
            dtype = np.float32 if (layer, expert) == (0, 3) else np.int8
            for projection in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                tensors[name] = np.ones((8, 8), dtype)
    save_file(tensors, model / "model.safetensors")
    stats, output = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    write_statistics(observed(), str(stats), overwrite=False)

    def run(*more: object) -> str:
        arguments = ["plan", stats, "--output", output, "--overwrite", "--force", *more, "--drop-unsound", model]
        monkeypatch.setattr(sys, "argv", ["reap-serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().err

    assert "keeps" not in run("--keep-experts", 2)
    plan = read_plan(output)
    assert [layer.kept for layer in plan.layers] == [(1, 2), (0, 1)]
    (only,) = plan.provenance["unsound_experts"]  # type: ignore[misc, union-attr]
    assert (only["layer"], only["expert"], only["kept"]) == (0, 3, False)  # type: ignore[index, call-overload]
    assert "warning: layer 0 keeps expert 3: model.layers.0.mlp.experts.3 has" in run("--keep-experts", 4)
