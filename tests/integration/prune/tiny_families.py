"""The tiny model of each family: its settings, of which `family_checkpoint` writes a checkpoint of a few kilobytes.

8 experts, top-2 (llama4: top-1), 3 or 4 layers, float32; groups and correction biases wherever the family has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NUM_EXPERTS = 8

SMALL: Mapping[str, object] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA: Mapping[str, object] = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# Sparse attention over the tokens that a small indexer chooses.
INDEXER: Mapping[str, object] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
GROUPS: Mapping[str, object] = {"n_group": 2, "topk_group": 1}
LINEAR_ATTENTION: Mapping[str, object] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A tiny model.

    Attributes:
        model_type: As transformers calls the configuration.
        settings: What differs from `SMALL`.
        auto_class: transformers' class that builds and loads it.
        text: Settings of the nested text configuration, None when there is none.
        servable: Settings in place of these in checkpoints that vLLM is to serve.
        hub_config: Keys that hub checkpoints have and transformers leaves out.
    """

    model_type: str
    settings: Mapping[str, object] = field(default_factory=dict)
    auto_class: str = "AutoModelForCausalLM"
    text: Mapping[str, object] | None = None
    servable: Mapping[str, object] = field(default_factory=dict)
    hub_config: Mapping[str, object] = field(default_factory=dict)


VISION: Mapping[str, object] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 32,
}
MROPE: Mapping[str, object] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# An expert's size of its own, in families that have one size for all: vLLM's fallback would read it.
ABSENT = {"moe_intermediate_size": None}
NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
EIGHT = {"num_experts": NUM_EXPERTS}
EIGHT_LOCAL = {"num_local_experts": NUM_EXPERTS}
EIGHT_ROUTED = {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1}

FAMILIES: Mapping[str, Family] = {
    "qwen2_moe": Family("qwen2_moe", {**EIGHT, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]}),
    "qwen3_moe": Family("qwen3_moe", {**EIGHT, "norm_topk_prob": True}),
    "qwen3_next": Family("qwen3_next", {**EIGHT, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 16}),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text", {**EIGHT, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 16}
    ),
    "mixtral": Family("mixtral", EIGHT_LOCAL),
    "olmoe": Family("olmoe", EIGHT),
    "flex_olmo": Family("flex_olmo", {**EIGHT, **ABSENT}),
    "deepseek_v2": Family(
        "deepseek_v2",
        {**EIGHT_ROUTED, **MLA, **GROUPS, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
    ),
    "deepseek_v3": Family(
        "deepseek_v3", {**EIGHT_ROUTED, **MLA, **GROUPS, "first_k_dense_replace": 1}, hub_config=NOAUX
    ),
    "kimi_k2": Family(
        "deepseek_v3",
        {**EIGHT_ROUTED, **MLA, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        hub_config=NOAUX,
    ),
    "deepseek_v32": Family(
        "deepseek_v32", {**EIGHT_ROUTED, **MLA, **GROUPS, **INDEXER, "first_k_dense_replace": 1}, hub_config=NOAUX
    ),
    "glm_moe_dsa": Family(
        "glm_moe_dsa",
        {**EIGHT_ROUTED, **MLA, **INDEXER, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        hub_config=NOAUX,
    ),
    "glm4_moe": Family("glm4_moe", {**EIGHT_ROUTED, "first_k_dense_replace": 1}),
    "glm4_moe_lite": Family("glm4_moe_lite", {**EIGHT_ROUTED, **MLA}, hub_config={"first_k_dense_replace": 1}),
    "dots1": Family("dots1", {**EIGHT_ROUTED, "first_k_dense_replace": 1}),
    "gpt_oss": Family("gpt_oss", {**EIGHT_LOCAL, "intermediate_size": 32}),
    "llama4_text": Family(
        "llama4_text",
        {
            **EIGHT_LOCAL,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "num_hidden_layers": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "ernie4_5_moe": Family("ernie4_5_moe", {"moe_num_experts": NUM_EXPERTS, "moe_k": 2, "moe_layer_start_index": 1}),
    "minimax_m2": Family(
        "minimax_m2", EIGHT_LOCAL, hub_config={"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True}
    ),
    "granitemoe": Family("granitemoe", EIGHT_LOCAL),
    "granitemoeshared": Family("granitemoeshared", {**EIGHT_LOCAL, "shared_intermediate_size": 16}),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {**EIGHT_LOCAL, "shared_intermediate_size": 16, "layer_types": ["attention"] * 3, "mamba_n_heads": 2},
    ),
    "phimoe": Family(
        "phimoe",
        # vLLM has these whatever the configuration says, and leaves out that of the language head.
        {**EIGHT_LOCAL, "attention_bias": True},
        hub_config={"architectures": ["PhiMoEForCausalLM"]},
    ),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", {**EIGHT, **ABSENT, "moe_topk": 2}),
    "lfm2_moe": Family("lfm2_moe", {**EIGHT, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}),
    "gemma4_text": Family(
        "gemma4_text",
        {
            **EIGHT,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 16,
        },
    ),
    "afmoe": Family(
        "afmoe",
        {**EIGHT, "num_dense_layers": 1, "layer_types": ["full_attention"] * 3},
        hub_config={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    ),
    "hy_v3": Family(
        "hy_v3",
        EIGHT,
        hub_config={"first_k_dense_replace": 1, "route_norm": True, "qk_norm": True, "expert_hidden_dim": 64},
    ),
    "nemotron_h": Family(
        "nemotron_h",
        {
            **EIGHT_ROUTED,
            "layers_block_type": ["full_attention", "moe", "full_attention", "moe"],
            "moe_shared_expert_intermediate_size": 16,
            "mamba_num_heads": 2,
            "mamba_head_dim": 16,
        },
    ),
    "exaone_moe": Family(
        "exaone_moe",
        {
            **EIGHT,
            **GROUPS,
            "num_shared_experts": 1,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "cohere2_moe": Family("cohere2_moe", {**EIGHT, "first_k_dense_replace": 1, "layer_types": ["full_attention"] * 3}),
    "mellum": Family("mellum", {**EIGHT, "layer_types": ["full_attention"] * 3}),
    "solar_open": Family("solar_open", EIGHT_ROUTED),
    "axk1": Family(
        "axk1",
        {**EIGHT_ROUTED, **MLA, **GROUPS, "first_k_dense_replace": 1},
        # vLLM wants a norm in dense layers that the layout of transformers lacks.
        servable={"first_k_dense_replace": 0},
        hub_config=NOAUX,
    ),
    "jamba": Family(
        "jamba",
        {**EIGHT, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "laguna": Family("laguna", {**EIGHT, "layer_types": ["full_attention"] * 3}),
    "mimo_v2_flash": Family(
        "mimo_v2_flash",
        {**EIGHT_ROUTED, "layer_types": ["full_attention"] * 3},
        servable={"v_head_dim": 32},
        hub_config={
            "hybrid_layer_pattern": [0, 0, 0],
            "moe_layer_freq": [0, 1, 1],
            "layernorm_epsilon": 1e-5,
            "partial_rotary_factor": 0.334,
            "rope_theta": 5000000,
        },
    ),
    "minimax": Family("minimax", {**EIGHT_LOCAL, "layer_types": ["full_attention"] * 3}),
    "kimi_linear": Family(
        "kimi_linear",
        {
            **EIGHT_LOCAL,
            **MLA,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_attn_config": {"num_heads": 2, "head_dim": 16, "kda_layers": [1, 3], "full_attn_layers": [2]},
            "num_expert_group": 1,
            "topk_group": 1,
        },
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        {"vision_config": {**VISION, "num_position_embeddings": 16}},
        "AutoModelForImageTextToText",
        {**EIGHT, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 16, "rope_parameters": MROPE},
    ),
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        {"vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
        "AutoModelForImageTextToText",
        {**EIGHT, "rope_parameters": MROPE},
    ),
    "llama4": Family(
        "llama4",
        {
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 128,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            }
        },
        "AutoModelForImageTextToText",
        {**EIGHT_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    ),
    "glm4v_moe": Family(
        "glm4v_moe",
        {"vision_config": {**VISION, "image_size": 28, "out_hidden_size": 32}},
        "AutoModelForImageTextToText",
        {**EIGHT_ROUTED, "first_k_dense_replace": 1, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
    ),
}
