"""Plans that keep different numbers of experts in different layers: written on request only, for a patched vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_checkpoint import CONFIG, expert_bytes, read_all, write_checkpoint, write_plan

from reap_serve.cli.app import main
from reap_serve.errors import ArchitectureError, PlanError
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.manifest import read_manifest
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1, unequal_layers=True)
KEPT = {0: [1, 3], 1: [0, 2, 3]}


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    plan = write_plan(tmp_path / "plan.json", KEPT)
    return prune(str(write_checkpoint(tmp_path / "source")), plan, tmp_path / "out", OPTIONS, overwrite=False).output


def test_each_layer_has_its_own_count(pruned: Path) -> None:
    config = json.loads((pruned / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_layer"]) == (3, [2, 3])
    tensors = read_all(pruned)
    for layer, kept in KEPT.items():
        rows = b"".join(bytes([old] * 4) for old in kept)
        assert tensors[f"model.layers.{layer}.mlp.gate.weight"] == ("BF16", [len(kept), 2], rows)
        last = f"model.layers.{layer}.mlp.experts.{len(kept) - 1}.up_proj.weight"
        assert tensors[last] == ("U8", [2, 3], expert_bytes(layer, kept[-1], 1))
        assert f"model.layers.{layer}.mlp.experts.{len(kept)}.up_proj.weight" not in tensors


def test_parameters_are_counted_layer_by_layer(pruned: Path) -> None:
    """Per layer a norm of 2, router rows of 2, experts of 18 bytes of two 4-bit weights; top-2; two more of 2."""
    manifest = read_manifest(pruned)
    assert manifest.parameters_after.total == (2 + 2 * 2 + 2 * 36) + (2 + 3 * 2 + 3 * 36) + 4
    assert manifest.parameters_after.active == (2 + 2 * 2 + 2 * 36) + (2 + 3 * 2 + 2 * 36) + 4
    card = (pruned / "README.md").read_text()
    assert "# source, 2 to 3 of 4 experts" in card
    assert "38% of the routed experts of the layers were dropped" in card
    assert "stock vLLM does not load it" in card


def test_it_is_sound_with_a_warning(pruned: Path) -> None:
    for source in (None, str(pruned.parent / "source")):
        report = verify(pruned, source, None)
        assert report.sound
        assert [(each.severity, each.check) for each in report.findings] == [("warning", "unequal")]


@pytest.mark.parametrize("counts", [[2], [2, 3, 3], [1, 3], [2, 4], [3, 2], None, 3, ["2", 3], [2, True]])
def test_a_wrong_list_of_counts_is_found(pruned: Path, counts: object) -> None:
    path = pruned / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts_per_layer": counts}))
    assert not verify(pruned, None, None).sound


def test_it_is_refused_unless_asked_for(tmp_path: Path) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    options = PruneOptions(MtpChoice.CUT, 1 << 30, 1)
    with pytest.raises(PlanError, match="between 2 and 3 experts a layer; stock vLLM serves one count"):
        prune(str(source), plan, tmp_path / "out", options, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_it_is_refused_for_a_family_that_no_patch_serves(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "qwen2_moe"}
    source, plan = write_checkpoint(tmp_path / "source", config), write_plan(tmp_path / "plan.json", KEPT)
    with pytest.raises(ArchitectureError, match=r"no patch lets vLLM serve .* layers of qwen2_moe"):
        prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_the_line_says_how_many_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    output = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["reap-serve", "prune", str(source), str(plan), str(output), "--unequal-layers"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"{output}: 2 to 3 of 4 experts a layer" in capsys.readouterr().out
