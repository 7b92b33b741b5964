"""Checkpoints of families that transformers does not have, written tensor by tensor under their published names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, EXPERTS, HIDDEN, WIDTH, DENSE_WIDTH, VOCABULARY = 3, 8, 128, 64, 128, 256
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32

# Ling 2.0: groups, sigmoid scores with a correction bias, a shared expert, a dense first layer.
BAILING: dict[str, object] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    "model_type": "bailing_moe_v2",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "embedding_dropout": 0.0,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
}
CONFIGURATION = """from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    model_type = "bailing_moe_v2"
"""


def build_bailing(directory: Path) -> None:
    """Writes it, with the configuration class that its hub repositories carry."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    def mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": random(width, HIDDEN),
            f"{prefix}.up_proj.weight": random(width, HIDDEN),
            f"{prefix}.down_proj.weight": random(HIDDEN, width),
        }

    tensors = {
        "model.word_embeddings.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        root = f"model.layers.{layer}"
        tensors |= {
            f"{root}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{root}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{root}.attention.query_key_value.weight": random((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            f"{root}.attention.query_layernorm.weight": torch.ones(HEAD_DIM),
            f"{root}.attention.key_layernorm.weight": torch.ones(HEAD_DIM),
            f"{root}.attention.dense.weight": random(HIDDEN, HEADS * HEAD_DIM),
        }
        if layer == 0:
            tensors |= mlp(f"{root}.mlp", DENSE_WIDTH)
            continue
        tensors[f"{root}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
        tensors[f"{root}.mlp.gate.expert_bias"] = random(EXPERTS)
        tensors |= mlp(f"{root}.mlp.shared_experts", WIDTH)
        for expert in range(EXPERTS):
            tensors |= mlp(f"{root}.mlp.experts.{expert}", WIDTH)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(BAILING))
    (directory / "configuration_bailing_moe_v2.py").write_text(CONFIGURATION)
