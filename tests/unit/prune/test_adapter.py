"""Adapters that change experts and routers, cut by the plan of their base; and those that need no cut."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from odd_checkpoint import CONFIG, KEPT, Tensors, dense, plan, rows, tensor, trunk, write
from small_checkpoint import read_back, safetensors_bytes

from reap_serve.errors import ArchitectureError, InputFileError, MismatchError, OutputExistsError
from reap_serve.prune.adapter import prune_adapter

ROOT = "base_model.model.model.layers"


def write_adapter(folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    (folder / "README.md").write_text("# Adapter")
    return folder


def cut(tmp_path: Path, tensors: Tensors, **config: object) -> tuple[Tensors, Mapping[str, object]]:
    model = write(tmp_path / "model", CONFIG, {**dense(), **trunk()})
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    output = tmp_path / "out"
    result = prune_adapter(adapter, str(model), plan(tmp_path / "plan.json"), output, overwrite=False)
    assert result.output == output
    assert (output / "README.md").read_text() == "# Adapter"
    return read_back(output / "adapter_model.safetensors"), json.loads((output / "adapter_config.json").read_text())


def of_experts(layer: int) -> Tensors:
    found: Tensors = {}
    for expert in range(8):
        base = f"{ROOT}.{layer}.mlp.experts.{expert}.up_proj"
        found[f"{base}.lora_A.weight"] = tensor(f"{base}A", "BF16", 4, 16)
        found[f"{base}.lora_B.weight"] = tensor(f"{base}B", "BF16", 8, 4)
    return found


def test_experts_of_their_own_follow_their_numbers(tmp_path: Path) -> None:
    tensors = {**of_experts(0), **of_experts(1), f"{ROOT}.0.self_attn.q_proj.lora_A.weight": tensor("q", "BF16", 4, 16)}
    written, config = cut(
        tmp_path,
        tensors,
        target_modules=["up_proj", "q_proj"],
        rank_pattern={"layers.0.mlp.experts.3.up_proj": 4, "layers.0.mlp.experts.5.up_proj": 8},
    )
    assert len(written) == 1 + 2 * 2 * 4
    for layer, kept in KEPT.items():
        for new, old in enumerate(kept):
            for part in ("lora_A", "lora_B"):
                found = written[f"{ROOT}.{layer}.mlp.experts.{new}.up_proj.{part}.weight"]
                assert found[2] == tensors[f"{ROOT}.{layer}.mlp.experts.{old}.up_proj.{part}.weight"][2]
    assert config["target_modules"] == ["up_proj", "q_proj"]
    assert config["rank_pattern"] == {"layers.0.mlp.experts.2.up_proj": 8}


def test_a_router_is_cut_in_its_second_matrix(tmp_path: Path) -> None:
    base = f"{ROOT}.0.mlp.gate"
    tensors: Tensors = {
        f"{base}.lora_A.weight": tensor("A", "BF16", 4, 16),
        f"{base}.lora_B.weight": tensor("B", "BF16", 8, 4),
        f"{base}.lora_magnitude_vector.weight": tensor("m", "F32", 8),
        f"{ROOT}.1.mlp.gate.weight": tensor("full", "BF16", 8, 16),
    }
    written, _ = cut(tmp_path, tensors, target_modules=["gate"])
    assert written[f"{base}.lora_A.weight"][2] == tensors[f"{base}.lora_A.weight"][2]
    for part in ("lora_B", "lora_magnitude_vector"):
        assert written[f"{base}.{part}.weight"][2] == rows(tensors[f"{base}.{part}.weight"], KEPT[0])
    full = f"{ROOT}.1.mlp.gate.weight"
    assert written[full][2] == rows(tensors[full], KEPT[1])


def test_experts_in_one_tensor_are_cut_as_peft_lays_them_out(tmp_path: Path) -> None:
    """Rank 2, 8 experts: `lora_A` [16, 3] holds 2 rows an expert, `lora_B` [1, 16] holds 8 columns a rank."""
    base = f"{ROOT}.0.mlp.experts"
    tensors: Tensors = {
        f"{base}.base_layer.lora_A.weight": ("U8", [16, 3], bytes(range(48))),
        f"{base}.lora_B.weight": ("I32", [1, 16], struct.pack("<16i", *range(16))),
    }
    written, _ = cut(tmp_path, tensors, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    dtype, shape, data = written[f"{base}.base_layer.lora_A.weight"]
    # Kept are experts 0, 2, 5 and 7: rows 0-1, 4-5, 10-11, 14-15.
    assert (dtype, shape) == ("U8", [8, 3])
    assert data == bytes(byte for row in (0, 1, 4, 5, 10, 11, 14, 15) for byte in range(row * 3, row * 3 + 3))
    dtype, shape, data = written[f"{base}.lora_B.weight"]
    assert shape == [1, 8]
    assert struct.unpack("<8i", data) == (0, 2, 5, 7, 8, 10, 13, 15)


def test_an_adapter_of_attention_needs_no_change(tmp_path: Path) -> None:
    model = write(tmp_path / "model", CONFIG, {**dense(), **trunk()})
    tensors = {
        f"{ROOT}.0.self_attn.q_proj.lora_A.weight": tensor("q", "BF16", 8, 16),
        f"{ROOT}.0.mlp.shared_expert.up_proj.lora_B.weight": tensor("s", "BF16", 8, 4),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["q_proj"])
    output = tmp_path / "out"
    result = prune_adapter(adapter, str(model), plan(tmp_path / "plan.json"), output, overwrite=False)
    assert result.output is None
    assert not output.exists()


@pytest.mark.parametrize(
    "name",
    [
        f"{ROOT}.0.mlp.experts.3.gate.extra.lora_C.weight",
        "base_model.model.other.layers.0.mlp.experts.3.up_proj.lora_A.weight",
        f"{ROOT}.0.mlp.gate.lora_B.weight",
        f"{ROOT}.0.mlp.experts.lora_A.weight",
    ],
)
def test_what_is_not_understood_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Shapes [9, 5] are those of no layout."""
    model = write(tmp_path / "model", CONFIG, {**dense(), **trunk()})
    adapter = write_adapter(tmp_path / "adapter", {name: tensor("x", "BF16", 9, 5)})
    if "lora_C" in name:
        # An expert of the family, whatever stands below it, follows its number.
        result = prune_adapter(
            adapter, str(model), plan(tmp_path / "p.json", {0: [3, 4], 1: [0, 1]}), tmp_path / "out", overwrite=False
        )
        assert result.output is not None
        return
    with pytest.raises(ArchitectureError, match=name.replace(".", r"\.")):
        prune_adapter(adapter, str(model), plan(tmp_path / "p.json"), tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_calls_its_layers_otherwise_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", CONFIG, {**dense(), **trunk()})
    adapter = write_adapter(tmp_path / "adapter", of_experts(0))
    other = plan(tmp_path / "plan.json")
    other.write_text(other.read_text().replace("model.layers.1", "model.layers.5"))
    with pytest.raises(MismatchError, match=r"index 1 'model\.layers\.5\.mlp\.experts'"):
        prune_adapter(adapter, str(model), other, tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_and_its_patterns_are_named(tmp_path: Path) -> None:
    model = str(write(tmp_path / "model", CONFIG, {**dense(), **trunk()}))
    name = f"{ROOT}.0.mlp.experts.8.up_proj.lora_A.weight"
    adapter = write_adapter(tmp_path / "wider", {**of_experts(0), name: tensor("x", "BF16", 4, 16)})
    with pytest.raises(ArchitectureError, match="is of expert 8, and the model has 8; give the model that"):
        prune_adapter(adapter, model, plan(tmp_path / "p.json"), tmp_path / "out", overwrite=False)
    adapter = write_adapter(tmp_path / "patterns", of_experts(0), rank_pattern={"experts.3": 2})
    with pytest.raises(ArchitectureError, match=r"adapter_config\.json names experts by the pattern 'experts\.3'"):
        prune_adapter(adapter, model, plan(tmp_path / "p.json"), tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_incomplete_adapters(tmp_path: Path) -> None:
    model = write(tmp_path / "model", CONFIG, {**dense(), **trunk()})
    adapter = write_adapter(tmp_path / "adapter", {})
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputFileError, match=r"only adapter_model\.bin"):
        prune_adapter(adapter, str(model), plan(tmp_path / "p.json"), tmp_path / "out", overwrite=False)
    with pytest.raises(InputFileError, match=r"adapter_config\.json does not exist"):
        prune_adapter(tmp_path / "nowhere", str(model), tmp_path / "p.json", tmp_path / "out", overwrite=False)


def test_overwrite_replaces_an_earlier_output_and_never_the_adapter(tmp_path: Path) -> None:
    model = str(write(tmp_path / "model", CONFIG, {**dense(), **trunk()}))
    adapter = write_adapter(tmp_path / "adapter", of_experts(0))
    output, cut_by = tmp_path / "out", plan(tmp_path / "plan.json")
    prune_adapter(adapter, model, cut_by, output, overwrite=False)
    (output / "stale").write_text("")
    assert prune_adapter(adapter, model, cut_by, output, overwrite=True).output == output
    assert not (output / "stale").exists()
    held = (output / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="out is read by this command"):
        prune_adapter(output, model, cut_by, output, overwrite=True)
    inside = plan(output / "plan.json")
    with pytest.raises(OutputExistsError, match=r"out holds .*plan\.json, an input of this command"):
        prune_adapter(adapter, model, inside, output, overwrite=True)
    assert (output / "adapter_model.safetensors").read_bytes() == held
