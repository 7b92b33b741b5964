"""Experts, routers and vectors of one entry an expert, under names that the family does not list."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_checkpoint import CONFIG, KEPT, QWEN35, Tensors, block, dense, plan, read, rows, tensor, trunk, write

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import known_architectures
from reap_serve.errors import ArchitectureError, InputFileError
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import prune
from reap_serve.prune.unlisted import UnlistedNames
from reap_serve.prune.verify import verify
from reap_serve.weight_headers import Tensor

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1)
DROP = PruneOptions(MtpChoice.DROP, 1 << 30, 1)
ROOT = "model.language_model"
DEEPSEEK = {
    **{key: value for key, value in CONFIG.items() if key != "num_experts"},
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}

DRAFTS = (
    "model.mtp.layers.0",
    "language_model.mtp.layers.0",
    "model.language_model.mtp.layers.0",
    "mtp.0",
    "mtp_layers.0",
    "draft.decoder.blocks.11",
)
ROOTS = ("model.language_model.language_model", "model.text_model", "base_model.model.model", "_orig_mod.model", "")
VECTORS = {
    "mlp.e_score_correction_bias": DEEPSEEK,
    "mlp.expert_bias": DEEPSEEK,
    "mlp.router_bias": CONFIG,
    "mlp.tokens_per_expert": CONFIG,
    "mlp.load_ema": CONFIG,
    "router_stats": CONFIG,
}


def refused(tmp_path: Path, config: Mapping[str, object], tensors: Tensors) -> str:
    source = write(tmp_path / "model", config, tensors)
    with pytest.raises(ArchitectureError) as caught:
        prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize("draft", DRAFTS)
def test_draft_layers_under_an_unknown_root_are_refused_by_name(draft: str, tmp_path: Path) -> None:
    message = refused(tmp_path, QWEN35, {**dense(ROOT), **trunk(ROOT), **block(f"{draft}.mlp")})
    assert message.startswith(f"{draft}.mlp.gate.weight stands below '{draft[: -len(draft.rpartition('.')[2])]}'")
    assert "mtp.layers.N" in message


def test_draft_layers_that_the_family_can_drop_are_dropped(tmp_path: Path) -> None:
    source = write(tmp_path / "model", QWEN35, {**dense(ROOT), **trunk(ROOT), **block("mtp.0.mlp")})
    prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", DROP, overwrite=False)
    assert not any(name.startswith("mtp.") for name in read(tmp_path / "out"))
    assert verify(tmp_path / "out", str(source), None).findings == ()


@pytest.mark.parametrize("root", ROOTS)
def test_an_unknown_root_is_named_beside_the_known_ones(root: str, tmp_path: Path) -> None:
    prefix = f"{root}." if root else ""
    tensors = {name.removeprefix("x."): entry for name, entry in trunk(prefix.removesuffix(".") or "x").items()}
    message = refused(tmp_path, QWEN35, {**dense("model"), **tensors})
    assert f"stands below '{prefix}layers.'" in message
    assert "known below model.layers.N, model.language_model.layers.N" in message
    assert "download" not in message


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_beside_the_router_are_refused_by_name(name: str, tmp_path: Path) -> None:
    vectors = {f"model.layers.{layer}.{name}": tensor(f"{name}{layer}", "F32", 8) for layer in (0, 1)}
    message = refused(tmp_path, VECTORS[name], {**dense(), **trunk(), **vectors})
    assert message.startswith(f"model.layers.0.{name} has 8 entries")


def test_other_names_of_projections_are_named(tmp_path: Path) -> None:
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors = {
        name.replace(name.split(".")[-2], names.get(name.split(".")[-2], name.split(".")[-2])): entry
        for name, entry in trunk().items()
    }
    source = write(tmp_path / "model", CONFIG, {**dense(), **tensors})
    with pytest.raises(InputFileError, match="no expert has a weight gate_proj, only w1, w2, w3; rename them"):
        prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)


@pytest.mark.parametrize("module", ["switch_mlp", "switch_glu"])
def test_the_layout_of_mlx_is_named(module: str, tmp_path: Path) -> None:
    stacks = {
        f"model.layers.{layer}.mlp.{module}.{projection}.weight": tensor(projection, "BF16", 8, 8, 16)
        for layer in (0, 1)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    routers = {name: entry for name, entry in trunk().items() if "experts" not in name}
    message = refused(tmp_path, CONFIG, {**dense(), **routers, **stacks})
    assert f"model.layers.0.mlp.{module}.gate_proj.weight" in message
    assert "a layout of MLX" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts_list.3.up.weight",
        "model.layers.0.mlp.expert_3.weight",
        "model.layers.1.block_sparse_moe.experts.0.w1.weight",
        "model.aux.local_experts.2.proj",
        "model.layers.0.mlp.[bold]experts.2.w",
        "model.layers.0.moe-experts.2.w",
    ],
)
def test_numbered_experts_are_found_by_their_number(name: str, tmp_path: Path) -> None:
    extra = {name: tensor(name, "BF16", 3, 5)}
    assert name in refused(tmp_path, CONFIG, {**dense(), **trunk(), **extra})


def test_stacks_and_vectors_with_further_axes_are_found(tmp_path: Path) -> None:
    for number, (name, shape) in enumerate(
        {"mlp.bias_of_load": (1, 8), "mlp.w13": (8, 4, 16), "moe.w1": (8, 4, 16), "mlp.expert_stats": (8, 3)}.items()
    ):
        extra = {f"model.layers.1.{name}": tensor(name, "BF16", *shape)}
        message = refused(tmp_path / str(number), CONFIG, {**dense(), **trunk(), **extra})
        assert message.startswith(f"model.layers.1.{name} has 8 entries")


def test_stacked_experts_outside_the_layers_are_found(tmp_path: Path) -> None:
    extra = {"drafter.moe.experts.gate_up": tensor("s", "BF16", 8, 4, 4)}
    assert "drafter.moe.experts.gate_up belongs to experts" in refused(
        tmp_path, CONFIG, {**dense(), **trunk(), **extra}
    )


# Names that look like routing and are not, with shapes in which some axis is as long as there are experts.
SOUND = {
    "model.layers.0.mlp.shared_expert.gate_proj.weight": (8, 16),
    "model.layers.0.mlp.shared_expert.bias": (8,),
    "model.layers.0.mlp.shared_experts.0.up_proj.weight": (8, 16),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, 16),
    "model.layers.0.share_expert.down_proj.weight": (16, 8),
    "model.layers.0.self_attn.q_norm.weight": (8,),
    "model.layers.0.self_attn.gate.weight": (8, 16),
    "model.layers.0.linear_attn.A_log": (8,),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.visual.blocks.3.attn.gate": (8,),
    "model.visual.blocks.0.mlp.gate_proj.weight": (8, 16),
    "model.visual.patch_embed.proj.weight": (8, 3, 2, 2),
    "model.layers.0.mlp.expert_norm.weight": (16,),
    "model.router_temperature": (1,),
}


def test_sound_neighbours_are_carried(tmp_path: Path) -> None:
    extra = {name: tensor(name, "BF16", *shape) for name, shape in SOUND.items()}
    source = write(tmp_path / "model", CONFIG, {**dense(), **trunk(), **extra})
    prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    written = read(tmp_path / "out")
    assert {name: tuple(written[name][1]) for name in SOUND} == SOUND
    assert verify(tmp_path / "out", str(source), None).findings == ()
    assert verify(tmp_path / "out", None, None).findings == ()


@pytest.mark.parametrize("talkers", [6, 8])
def test_another_decoder_with_experts_of_its_own_is_carried(talkers: int, tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"text_config": {**CONFIG, "model_type": "qwen3_omni_moe_text"}},
        "talker_config": {"text_config": {**CONFIG, "num_experts": talkers}},
        "quantization_config": {"ignore": ["talker.model.layers.0.mlp.experts.3.up_proj"]},
    }
    tensors = {**dense("thinker.model"), **trunk("thinker.model"), **trunk("talker.model", experts=talkers)}
    source = write(tmp_path / "model", config, tensors)
    prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    written = read(tmp_path / "out")
    talker = {name for name in tensors if name.startswith("talker.")}
    assert {name: written[name][2] for name in talker} == {name: tensors[name][2] for name in talker}
    gate = "thinker.model.layers.1.mlp.gate.weight"
    assert written[gate][2] == rows(tensors[gate], KEPT[1])
    report = verify(tmp_path / "out", str(source), None)
    assert report.findings == ()


@pytest.mark.parametrize("name", ["mlp.router_bias", "mlp.tokens_per_expert", "mlp.e_score_correction_bias"])
def test_verify_finds_what_another_tool_left_whole(name: str, tmp_path: Path) -> None:
    config = {**CONFIG, "num_experts": 4}
    vectors = {f"model.layers.0.{name}": tensor(name, "F32", 8)}
    output = write(tmp_path / "out", config, {**dense(), **trunk(experts=4), **vectors})
    report = verify(output, None, None)
    assert [each.check for each in report.findings if each.severity == "error"] == ["names"]
    draft = {**dense(), **trunk(experts=4), **block("mtp.layers.0.mlp", experts=8)}
    report = verify(write(tmp_path / "draft", config, draft), None, None)
    assert not report.sound


FAMILIES = [family for name, family in sorted(known_architectures().items()) if name != "deepseek_v4"]


@given(st.sampled_from(FAMILIES), st.integers(0, 40), st.sampled_from(["draft", "base_model.model.x", "y.z_1", "_o.m"]))
def test_the_names_of_every_family_are_found_under_every_root(family: object, layer: int, root: str) -> None:
    """A router of any family, moved under a root that no family lists, is found and the root is named."""
    from reap_serve.architectures.spec import Architecture

    assert isinstance(family, Architecture)
    names = TensorNames(family, 100)
    finder = UnlistedNames(family, names, {})
    for router in family.router:
        name = f"{root}.layers.{layer}.{router}"
        found = finder.find(Tensor(name, "f", "BF16", (8, 16), 0, 256), names.role(name), 8)
        assert found is not None
        assert f"'{root}.layers.'" in found.what
