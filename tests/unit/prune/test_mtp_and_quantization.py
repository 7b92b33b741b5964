"""Multi-token-prediction layers, groups, hash tables and zero experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from small_checkpoint import Entry, read_all, safetensors_bytes, write_plan

from reap_serve.architectures.spec import RoutingLimits
from reap_serve.errors import ArchitectureError, PlanError
from reap_serve.plan.record import Plan
from reap_serve.prune.decide import MtpChoice, make_cut
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.manifest import read_manifest
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify

CUT = PruneOptions(MtpChoice.CUT, 1 << 30, 1)
DROP = PruneOptions(MtpChoice.DROP, 1 << 30, 1)

DEEPSEEK: Mapping[str, object] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
NEXT: Mapping[str, object] = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
}


def block(layer: str, mark: int, *, bias: bool = False) -> dict[str, Entry]:
    """Router and experts of one layer; every byte of an expert is `mark + id`."""
    tensors: dict[str, Entry] = {
        f"{layer}.mlp.gate.weight": ("U8", [4, 1], bytes([mark, mark + 1, mark + 2, mark + 3]))
    }
    if bias:
        tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = ("U8", [4], bytes([mark, mark + 1, mark + 2, mark + 3]))
    for expert in range(4):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{layer}.mlp.experts.{expert}.{projection}.weight"] = ("U8", [1], bytes([mark + expert]))
    return tensors


def write(directory: Path, config: Mapping[str, object], tensors: dict[str, Entry]) -> Path:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def deepseek(directory: Path) -> Path:
    """A dense layer 0, experts in layer 1, and layer 2 for multi-token prediction."""
    head: dict[str, Entry] = {
        "model.layers.0.mlp.gate_proj.weight": ("U8", [1], b"d"),
        "model.layers.2.eh_proj.weight": ("U8", [1], b"e"),
        "model.layers.2.shared_head.head.weight": ("U8", [1], b"h"),
    }
    trunk, mtp = block("model.layers.1", 0x10, bias=True), block("model.layers.2", 0x20, bias=True)
    return write(directory, DEEPSEEK, {**head, **trunk, **mtp})


def qwen3_next(directory: Path) -> Path:
    """One layer and one for multi-token prediction under a root of its own."""
    head: dict[str, Entry] = {"mtp.fc.weight": ("U8", [1], b"f"), "mtp.norm.weight": ("U8", [1], b"n")}
    return write(directory, NEXT, {**head, **block("model.layers.0", 0x10), **block("mtp.layers.0", 0x20)})


@pytest.mark.parametrize(
    ("build", "trunk", "mtp", "others"),
    [
        (
            deepseek,
            "model.layers.1",
            "model.layers.2",
            {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.head.weight"},
        ),
        (qwen3_next, "model.layers.0", "mtp.layers.0", {"mtp.fc.weight", "mtp.norm.weight"}),
    ],
)
def test_mtp_layers_are_cut_with_the_trunk_or_dropped(
    build: object, trunk: str, mtp: str, others: set[str], tmp_path: Path
) -> None:
    assert callable(build)
    source = build(tmp_path / "source")
    plan = write_plan(tmp_path / "plan.json", {int(trunk[-1]): [1, 2]})
    prune(str(source), plan, tmp_path / "cut", CUT, overwrite=False)
    cut = read_all(tmp_path / "cut")
    for layer, mark in ((trunk, 0x10), (mtp, 0x20)):
        assert cut[f"{layer}.mlp.gate.weight"] == ("U8", [2, 1], bytes([mark + 1, mark + 2]))
        assert cut[f"{layer}.mlp.experts.0.up_proj.weight"][2] == bytes([mark + 1])
        assert cut[f"{layer}.mlp.experts.1.up_proj.weight"][2] == bytes([mark + 2])
        assert f"{layer}.mlp.experts.2.up_proj.weight" not in cut
    assert others <= set(cut)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert read_manifest(tmp_path / "cut").mtp == "cut"
    assert verify(tmp_path / "cut", str(source), None).findings == ()

    prune(str(source), plan, tmp_path / "drop", DROP, overwrite=False)
    dropped = read_all(tmp_path / "drop")
    assert set(dropped) == {name for name in cut if not name.startswith((mtp, "mtp."))}
    assert json.loads((tmp_path / "drop" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert verify(tmp_path / "drop", str(source), None).findings == ()


def test_the_correction_bias_is_cut_with_its_rows(tmp_path: Path) -> None:
    source = deepseek(tmp_path / "source")
    prune(str(source), write_plan(tmp_path / "plan.json", {1: [0, 3]}), tmp_path / "out", CUT, overwrite=False)
    bias = read_all(tmp_path / "out")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias == ("U8", [2], bytes([0x10, 0x13]))


def test_a_hash_table_refuses_a_cut(tmp_path: Path) -> None:
    config = {**NEXT, "model_type": "deepseek_v4", "n_routed_experts": 4}
    tensors: dict[str, Entry] = {
        "layers.0.ffn.gate.weight": ("U8", [4, 1], bytes(4)),
        "layers.0.ffn.gate.tid2eid": ("I64", [3, 2], bytes(48)),
    }
    for expert in range(4):
        for projection in ("w1", "w2", "w3"):
            tensors[f"layers.0.ffn.experts.{expert}.{projection}.weight"] = ("U8", [1], bytes([expert]))
    source = write(tmp_path / "source", config, tensors)
    with pytest.raises(ArchitectureError, match="table of token ids"):
        prune(str(source), write_plan(tmp_path / "plan.json", {0: [1, 2]}), tmp_path / "out", CUT, overwrite=False)
    everything = write_plan(tmp_path / "all.json", {0: [0, 1, 2, 3]})
    prune(str(source), everything, tmp_path / "out", CUT, overwrite=False)
    assert read_all(tmp_path / "out") == tensors


def test_router_rows_of_zero_experts_stay(tmp_path: Path) -> None:
    """LongCat's router has rows after the experts' that mean identity: they move up with the cut."""
    config = {
        "model_type": "longcat_flash",
        "num_layers": 1,
        "n_routed_experts": 4,
        "moe_topk": 2,
        "zero_expert_num": 2,
    }
    tensors: dict[str, Entry] = {
        **block("model.layers.0", 0x10),
        "model.layers.0.mlp.router.classifier.weight": ("U8", [6, 1], bytes([0, 1, 2, 3, 0xF0, 0xF1])),
        "model.layers.0.mlp.router.e_score_correction_bias": ("U8", [6], bytes([0, 1, 2, 3, 0xF0, 0xF1])),
    }
    del tensors["model.layers.0.mlp.gate.weight"]
    source = write(tmp_path / "source", config, tensors)
    prune(str(source), write_plan(tmp_path / "plan.json", {0: [1, 3]}), tmp_path / "out", CUT, overwrite=False)
    pruned = read_all(tmp_path / "out")
    assert pruned["model.layers.0.mlp.router.classifier.weight"] == ("U8", [4, 1], bytes([1, 3, 0xF0, 0xF1]))
    assert pruned["model.layers.0.mlp.router.e_score_correction_bias"] == ("U8", [4], bytes([1, 3, 0xF0, 0xF1]))
    assert verify(tmp_path / "out", str(source), None).findings == ()


def plan_of(kept: Sequence[int]) -> Plan:
    dropped = [expert for expert in range(8) if expert not in kept]
    layer = {"layer": "model.layers.0.mlp.experts", "index": 0, "kept": kept, "dropped": dropped}
    return Plan.model_validate({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": [layer]})


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 1, 2, 4], "keeps 1 to 3 experts a group"),
        ([0, 4], "keeps 1 experts a group"),
        ([0, 1, 4, 5], None),
        ([1, 2, 3, 4, 6, 7], None),
    ],
)
def test_groups_stay_equal(kept: list[int], message: str | None) -> None:
    """Two groups of four, top-2 of one group."""
    limits = RoutingLimits(num_experts=8, top_k=2, num_groups=2, top_k_groups=1, moe_layers=(0,))
    if message is None:
        assert make_cut(plan_of(kept), limits, MtpChoice.CUT).kept == {0: tuple(kept)}
        return
    with pytest.raises(PlanError, match=message):
        make_cut(plan_of(kept), limits, MtpChoice.CUT)


def test_what_drop_wrote_is_sound_where_there_were_no_draft_tensors(tmp_path: Path) -> None:
    """The configuration promises a layer that the weights lack: it promises none afterwards."""
    source = deepseek(tmp_path / "source")
    tensors = {name: entry for name, entry in read_all(source).items() if "layers.2." not in name}
    (source / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    plan = write_plan(tmp_path / "plan.json", {1: [1, 2]})
    prune(str(source), plan, tmp_path / "out", DROP, overwrite=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert verify(tmp_path / "out", str(source), plan).findings == ()
    manifest = json.loads((tmp_path / "out" / "reap_manifest.json").read_text())
    (tmp_path / "out" / "reap_manifest.json").write_text(json.dumps({**manifest, "mtp": None}))  # as 0.1 wrote it
    assert verify(tmp_path / "out", str(source), plan).findings == ()


def test_draft_layers_of_another_width_can_be_dropped(tmp_path: Path) -> None:
    source = qwen3_next(tmp_path / "source")
    tensors = read_all(source)
    tensors["mtp.layers.0.mlp.gate.weight"] = ("U8", [6, 1], bytes(6))
    (source / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    plan = write_plan(tmp_path / "plan.json", {0: [1, 2]})
    with pytest.raises(ArchitectureError, match="--mtp drop"):
        prune(str(source), plan, tmp_path / "out", CUT, overwrite=False)
    prune(str(source), plan, tmp_path / "out", DROP, overwrite=False)
    assert verify(tmp_path / "out", str(source), plan).findings == ()
