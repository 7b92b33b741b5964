"""Random checkpoints, one a family, of the smallest sizes that vLLM's CPU kernels take: multiples of 32.

8 experts, top-2 (llama4: top-1), 2 or 3 layers. Groups, correction biases, shared experts and scaling factors are on
wherever the family has them, and no two experts are alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NUM_EXPERTS = 8
VOCABULARY = 128

SMALL: Mapping[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EIGHT = {"num_experts": NUM_EXPERTS}
EIGHT_LOCAL = {"num_local_experts": NUM_EXPERTS, "intermediate_size": 32}
EIGHT_ROUTED = {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
GROUPS = {"n_group": 4, "topk_group": 2}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
# vLLM's latent attention takes heads of 512 + 64 alone.
MLA = {
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_hidden_layers": 3,
}
# The one for AMX takes bfloat16 alone.
REFERENCE_MLA = {"attention_backend": "CPU_MLA"}
DENSE_FIRST = {"first_k_dense_replace": 1, "num_hidden_layers": 3}
FULL_ATTENTION = {"layer_types": ["full_attention"] * 2}


@dataclass(frozen=True, slots=True)
class Family:
    """A small model.

    Attributes:
        model_type: As transformers calls the configuration.
        settings: What differs from `SMALL`.
        hub_config: Keys that hub checkpoints have and transformers leaves out.
        architecture: Class that vLLM looks up, where transformers writes another name.
        bfloat16_only: vLLM's CPU kernels for the family's other layers take bfloat16 alone.
        engine: Arguments of vLLM's engine.
    """

    model_type: str
    settings: Mapping[str, object] = field(default_factory=dict)
    hub_config: Mapping[str, object] = field(default_factory=dict)
    architecture: str | None = None
    bfloat16_only: bool = False
    engine: Mapping[str, object] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family("qwen3_moe", {**EIGHT, "norm_topk_prob": True}),
    "qwen2_moe": Family("qwen2_moe", {**EIGHT, "shared_expert_intermediate_size": 32}),
    "mixtral": Family("mixtral", EIGHT_LOCAL),
    "olmoe": Family("olmoe", {**EIGHT, "intermediate_size": 32}),
    "flex_olmo": Family("flex_olmo", {**EIGHT, "intermediate_size": 32}),
    "phimoe": Family(
        "phimoe", {**EIGHT_LOCAL, "attention_bias": True, "lm_head_bias": True}, architecture="PhiMoEForCausalLM"
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        {**EIGHT_ROUTED, **MLA, **GROUPS, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
        engine=REFERENCE_MLA,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {**EIGHT_ROUTED, **MLA, **GROUPS, "first_k_dense_replace": 1},
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        engine=REFERENCE_MLA,
    ),
    "glm4_moe": Family("glm4_moe", {**EIGHT_ROUTED, **DENSE_FIRST, **ONE_GROUP}),
    "glm4_moe_lite": Family(
        "glm4_moe_lite",
        {**EIGHT_ROUTED, **MLA, **ONE_GROUP},
        {"first_k_dense_replace": 1},
        engine=REFERENCE_MLA,
    ),
    "dots1": Family("dots1", {**EIGHT_ROUTED, **DENSE_FIRST, **ONE_GROUP}),
    "solar_open": Family("solar_open", {**EIGHT_ROUTED, **ONE_GROUP}),
    "exaone_moe": Family(
        "exaone_moe",
        {
            **EIGHT,
            **GROUPS,
            "num_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "afmoe": Family(
        "afmoe",
        {
            **EIGHT,
            "num_dense_layers": 1,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention"] * 3,
            "route_scale": 1.5,
        },
        {"score_func": "sigmoid", "route_norm": True, **ONE_GROUP},
    ),
    "hy_v3": Family(
        "hy_v3",
        EIGHT,
        {"first_k_dense_replace": 1, "route_norm": True, "qk_norm": True, "expert_hidden_dim": 32},
    ),
    "gpt_oss": Family("gpt_oss", {**EIGHT_LOCAL, "layer_types": ["sliding_attention", "full_attention"]}),
    "llama4_text": Family(
        "llama4_text",
        {**EIGHT_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    ),
    "granitemoe": Family("granitemoe", EIGHT_LOCAL),
    "granitemoeshared": Family("granitemoeshared", {**EIGHT_LOCAL, "shared_intermediate_size": 32}),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {**EIGHT_LOCAL, "shared_intermediate_size": 32, "layer_types": ["attention"] * 2, "mamba_n_heads": 2},
    ),
    "jamba": Family(
        "jamba",
        {**EIGHT, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "lfm2_moe": Family(
        "lfm2_moe",
        {**EIGHT, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_hidden_layers": 3},
    ),
    "gemma4_text": Family(
        "gemma4_text",
        {
            **EIGHT,
            **FULL_ATTENTION,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
        },
    ),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", {**EIGHT, "moe_topk": 2, "intermediate_size": 32}),
    "cohere2_moe": Family("cohere2_moe", {**EIGHT, **FULL_ATTENTION, "first_k_dense_replace": 1}),
    "mellum": Family("mellum", {**EIGHT, **FULL_ATTENTION}),
    "qwen3_next": Family(
        "qwen3_next",
        {
            **EIGHT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 1,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "shared_expert_intermediate_size": 32,
        },
        bfloat16_only=True,
    ),
}

# One of each kind that a layout or a drafter could disturb: softmax; sigmoid with groups, a correction bias and shared
# experts; shared experts; the weight on the input. The groups are of four experts, so that `HALF` keeps two of each.
# Attention is full: beside sliding windows vLLM takes no draft model, and beside chunks its answers change with one.
GROUPS_OF_FOUR = {"n_group": 2, "topk_group": 1}
FOUR: Mapping[str, Family] = {
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "exaone_moe": Family("exaone_moe", {**FAMILIES["exaone_moe"].settings, **GROUPS_OF_FOUR, **FULL_ATTENTION}),
    "qwen2_moe": FAMILIES["qwen2_moe"],
    "llama4_text": Family(
        "llama4_text", {**FAMILIES["llama4_text"].settings, **FULL_ATTENTION, "attention_chunk_size": None}
    ),
}
# A mask for models of the four: kept experts by layer, as JSON has them.
HALF: Mapping[str, list[int]] = {"0": [0, 2, 5, 7], "1": [1, 3, 4, 6], "2": [0, 1, 6, 7]}

# Ones that vLLM's CPU router serves wrongly.
REFUSED: Mapping[str, Family] = {
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        {"moe_num_experts": NUM_EXPERTS, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
}


def build(family: Family, directory: Path) -> None:
    """Writes the family's checkpoint in float32, or bfloat16 where vLLM takes nothing else."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.model_type, **{**SMALL, **family.settings})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name or "per_expert_scale" in name:
                tensor.add_(torch.randn_like(tensor) * 0.05)
            elif ("weight" in name and tensor.dim() > 1) or tensor.dim() == 3:
                tensor.normal_(std=0.1)
    model.to(torch.bfloat16 if family.bfloat16_only else torch.float32).save_pretrained(directory)
    path = directory / "config.json"
    written = json.loads(path.read_text()) | dict(family.hub_config)
    if family.architecture is not None:
        written["architectures"] = [family.architecture]
    path.write_text(json.dumps(written))
