"""Every family's data against published configurations and tensor names."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.architectures.resolve import known_architectures, resolve
from reap_serve.architectures.spec import Architecture, RoutingLimits

# Keys as the hub's config.json has them: model, configuration, (E, k, groups, groups chosen), first and last layer with
# experts, their number.
PUBLISHED: Mapping[str, tuple[Mapping[str, object], tuple[int, int, int, int], tuple[int, int, int]]] = {
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        (128, 8, 1, 1),
        (0, 47, 48),
    ),
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 61,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "moe_layer_freq": 1,
        },
        (256, 8, 8, 4),
        (3, 60, 58),
    ),
    "Kimi-K2": (
        {
            "model_type": "kimi_k2",
            "num_hidden_layers": 61,
            "n_routed_experts": 384,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
        },
        (384, 8, 1, 1),
        (1, 60, 60),
    ),
    "Kimi-K2.5, nested": (
        {
            "model_type": "kimi_k25",
            "text_config": {
                "model_type": "kimi_k2",
                "num_hidden_layers": 61,
                "n_routed_experts": 384,
                "num_experts_per_tok": 8,
                "first_k_dense_replace": 1,
            },
        },
        (384, 8, 1, 1),
        (1, 60, 60),
    ),
    "Llama-4-Maverick": (
        {
            "model_type": "llama4",
            "text_config": {
                "model_type": "llama4_text",
                "num_hidden_layers": 48,
                "num_local_experts": 128,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
            },
        },
        (128, 1, 1, 1),
        (1, 47, 24),
    ),
    "ERNIE-4.5-21B-A3B": (
        {
            "model_type": "ernie4_5_moe",
            "num_hidden_layers": 28,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 27,
            "moe_layer_interval": 1,
        },
        (64, 6, 1, 1),
        (1, 27, 27),
    ),
    "Hunyuan-A13B, lists per layer": (
        {"model_type": "hunyuan_v1_moe", "num_hidden_layers": 32, "num_experts": [64] * 32, "moe_topk": [8] * 32},
        (64, 8, 1, 1),
        (0, 31, 32),
    ),
    "Nemotron-H, a pattern": (
        {
            "model_type": "nemotron_h",
            "num_hidden_layers": 8,
            "hybrid_override_pattern": "MEM*EMEM",
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
        },
        (128, 6, 1, 1),
        (1, 6, 3),
    ),
    "MiMo-V2-Flash, a list of marks": (
        {
            "model_type": "mimo_v2_flash",
            "num_hidden_layers": 4,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "moe_layer_freq": [0, 1, 1, 1],
        },
        (256, 8, 1, 1),
        (1, 3, 3),
    ),
    "Step-3.5, a text of indices": (
        {
            "model_type": "step3p5",
            "num_hidden_layers": 6,
            "moe_num_experts": 288,
            "moe_top_k": 8,
            "moe_layers_enum": "3,4,5",
        },
        (288, 8, 1, 1),
        (3, 5, 3),
    ),
    "LongCat-Flash": (
        {
            "model_type": "longcat_flash",
            "num_layers": 28,
            "n_routed_experts": 512,
            "moe_topk": 12,
            "zero_expert_num": 256,
        },
        (512, 12, 1, 1),
        (0, 27, 28),
    ),
    "Jamba-1.5": (
        {
            "model_type": "jamba",
            "num_hidden_layers": 32,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        (16, 2, 1, 1),
        (1, 31, 16),
    ),
    "Ling-2.0": (
        {
            "model_type": "bailing_moe_v2",
            "num_hidden_layers": 20,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 1,
        },
        (256, 8, 8, 4),
        (1, 19, 19),
    ),
    "Qwen3-Omni": (
        {
            "model_type": "qwen3_omni_moe",
            "thinker_config": {
                "text_config": {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8},
            },
        },
        (128, 8, 1, 1),
        (0, 47, 48),
    ),
    "Kimi-Linear": (
        {
            "model_type": "kimi_linear",
            "num_hidden_layers": 27,
            "num_experts": 256,
            "num_experts_per_token": 8,
            "num_expert_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
        },
        (256, 8, 1, 1),
        (1, 26, 26),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_limits_of_published_configurations(name: str) -> None:
    config, (num_experts, top_k, groups, chosen), (first, last, count) = PUBLISHED[name]
    limits = resolve(config).limits(config)  # type: ignore[arg-type]
    assert limits == RoutingLimits(num_experts, top_k, groups, chosen, limits.moe_layers)
    assert (limits.moe_layers[0], limits.moe_layers[-1], len(limits.moe_layers)) == (first, last, count)


# (family, layers of the trunk, tensor) to (kind, layer, expert, belongs to multi-token prediction)
ROLES = [
    ("qwen3_moe", 4, "model.layers.3.mlp.gate.weight", (Kind.ROUTER, 3, None, False)),
    ("qwen3_moe", 4, "model.layers.3.mlp.experts.17.up_proj.weight", (Kind.EXPERT, 3, 17, False)),
    ("qwen3_moe", 4, "model.layers.3.mlp.experts.17.up_proj.input_scale", (Kind.EXPERT, 3, 17, False)),
    ("qwen3_moe", 4, "model.layers.3.self_attn.q_norm.weight", (Kind.OTHER, 3, None, False)),
    ("qwen3_moe", 4, "model.layers.3.mlp.experts.gate_up_proj", (Kind.STACKED, 3, None, False)),
    ("qwen2_moe", 4, "model.layers.3.mlp.shared_expert_gate.weight", (Kind.OTHER, 3, None, False)),
    ("qwen3_5_moe", 4, "model.language_model.layers.3.mlp.experts.down_proj", (Kind.STACKED, 3, None, False)),
    ("qwen3_5_moe", 4, "model.visual.blocks.3.mlp.linear_fc1.weight", (Kind.OTHER, None, None, False)),
    ("qwen3_5_moe", 4, "mtp.layers.0.mlp.experts.down_proj", (Kind.STACKED, 0, None, True)),
    ("qwen3_next", 4, "mtp.pre_fc_norm_hidden.weight", (Kind.OTHER, None, None, True)),
    ("deepseek_v3", 61, "model.layers.61.mlp.experts.5.down_proj.weight_scale_inv", (Kind.EXPERT, 61, 5, True)),
    ("deepseek_v3", 61, "model.layers.61.shared_head.norm.weight", (Kind.OTHER, 61, None, True)),
    ("deepseek_v3", 61, "language_model.model.layers.1.mlp.experts.5.up_proj.weight", (Kind.EXPERT, 1, 5, False)),
    ("deepseek_v3", 61, "model.layers.1.mlp.shared_experts.up_proj.weight", (Kind.OTHER, 1, None, False)),
    ("gpt_oss", 4, "model.layers.1.mlp.experts.gate_up_proj_blocks", (Kind.STACKED, 1, None, False)),
    ("gpt_oss", 4, "model.layers.1.mlp.experts.down_proj_bias", (Kind.STACKED, 1, None, False)),
    ("gpt_oss", 4, "model.layers.1.mlp.router.bias", (Kind.SLICED, 1, None, False)),
    ("llama4", 4, "language_model.model.layers.1.feed_forward.experts.gate_up_proj", (Kind.STACKED, 1, None, False)),
    (
        "llama4",
        4,
        "language_model.model.layers.1.feed_forward.shared_expert.up_proj.weight",
        (Kind.OTHER, 1, None, False),
    ),
    ("ernie4_5_moe", 4, "model.layers.1.mlp.moe_statics.e_score_correction_bias", (Kind.SLICED, 1, None, False)),
    ("minimax_m2", 4, "model.layers.1.block_sparse_moe.e_score_correction_bias", (Kind.SLICED, 1, None, False)),
    ("minimax_m2", 4, "model.layers.1.block_sparse_moe.experts.2.w1.weight_scale_inv", (Kind.EXPERT, 1, 2, False)),
    ("granitemoe", 4, "model.layers.1.block_sparse_moe.router.layer.weight", (Kind.ROUTER, 1, None, False)),
    ("granitemoe", 4, "model.layers.1.block_sparse_moe.input_linear.weight", (Kind.STACKED, 1, None, False)),
    ("granitemoe", 4, "model.layers.1.shared_mlp.input_linear.weight", (Kind.OTHER, 1, None, False)),
    ("hunyuan_v1_moe", 4, "model.layers.1.mlp.gate.wg.weight", (Kind.ROUTER, 1, None, False)),
    ("bailing_moe", 4, "model.layers.1.mlp.gate.expert_bias", (Kind.SLICED, 1, None, False)),
    ("bailing_moe", 4, "model.layers.4.mlp.experts.0.up_proj.weight", (Kind.EXPERT, 4, 0, True)),
    ("gemma4", 4, "model.language_model.layers.1.router.scale", (Kind.OTHER, 1, None, False)),
    ("gemma4", 4, "model.language_model.layers.1.router.per_expert_scale", (Kind.SLICED, 1, None, False)),
    ("gemma4", 4, "model.language_model.layers.1.experts.down_proj", (Kind.STACKED, 1, None, False)),
    ("step3p5", 4, "model.layers.1.moe.gate_proj.weight", (Kind.STACKED, 1, None, False)),
    ("step3p5", 4, "model.layers.1.moe.up_proj.weight_scale_2", (Kind.STACKED, 1, None, False)),
    ("step3p5", 4, "model.layers.1.moe.router_bias", (Kind.SLICED, 1, None, False)),
    ("nemotron_h", 4, "backbone.layers.1.mixer.experts.0.up_proj.weight", (Kind.EXPERT, 1, 0, False)),
    ("deepseek_v4", 4, "layers.1.ffn.gate.tid2eid", (Kind.HASH_TABLE, 1, None, False)),
    ("qwen3_moe", 4, "model.layers.3.mlp.gate.unheard_of", (Kind.UNKNOWN, 3, None, False)),
    ("qwen3_moe", 4, "model.layers.3.mlp.experts.unheard_of", (Kind.UNKNOWN, 3, None, False)),
]


@pytest.mark.parametrize(("family", "num_layers", "tensor", "expected"), ROLES)
def test_roles_of_published_names(
    family: str, num_layers: int, tensor: str, expected: tuple[Kind, int | None, int | None, bool]
) -> None:
    role = TensorNames(known_architectures()[family], num_layers).role(tensor)
    assert (role.kind, role.layer, role.expert, role.is_mtp) == expected


@pytest.mark.parametrize("family", known_architectures().values(), ids=lambda family: family.model_type)
def test_every_family_is_complete(family: Architecture) -> None:
    """One router, experts in some form, and no tensor claimed by two fields."""
    assert len(family.router) == 1
    assert family.experts or family.stacked
    assert bool(family.experts) == bool(family.projections)
    fields = [*family.router, *family.sliced, *family.stacked, *family.carried]
    assert len(fields) == len(set(fields))
    assert all(template.endswith("{layer}") for template in family.layers)
    assert family.experts is None or family.experts.endswith("{expert}")
