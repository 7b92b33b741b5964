"""The two models of the check: random weights, nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 4096


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    heads: int
    head_dim: int


# Small enough for an oracle in PyTorch, wide enough for FP8 blocks of 128.
SMALL = Shape(hidden=256, intermediate=128, experts=8, top_k=2, layers=2, heads=4, head_dim=64)
# Layers of Qwen3-30B-A3B.
REAL = Shape(hidden=2048, intermediate=768, experts=128, top_k=8, layers=8, heads=32, head_dim=128)


def config(shape: Shape) -> Any:
    """Its configuration."""
    import transformers

    return transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 8),
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )


def write_small(directory: Path) -> list[dict[str, torch.Tensor]]:
    """Writes the small model with weights; gives those of each layer's experts in float32."""
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config(SMALL)).to(torch.bfloat16)
    model.save_pretrained(directory)
    return [
        {
            "gate_up": layer.mlp.experts.gate_up_proj.detach().float(),
            "down": layer.mlp.experts.down_proj.detach().float(),
        }
        for layer in model.model.layers
    ]


def routers(directory: Path) -> torch.Tensor:
    """The routers of the small model [L, E, H], float32."""
    from safetensors.torch import load_file

    tensors = load_file(str(directory / "model.safetensors"))
    return torch.stack([tensors[f"model.layers.{index}.mlp.gate.weight"].float() for index in range(SMALL.layers)])


def write_config(directory: Path, shape: Shape) -> None:
    """Writes the configuration alone: the weights are vLLM's dummies."""
    chosen = config(shape)
    chosen.architectures = ["Qwen3MoeForCausalLM"]
    chosen.save_pretrained(directory)


def plan(kept: list[int]) -> dict[str, Any]:
    """A plan by hand that keeps these experts of the small model in every layer."""
    dropped = [expert for expert in range(SMALL.experts) if expert not in kept]
    layers = [
        {"layer": f"model.layers.{index}.mlp.experts", "index": index, "kept": kept, "dropped": dropped}
        for index in range(SMALL.layers)
    ]
    return {"schema_version": 1, "model": {}, "criterion": "by hand", "layers": layers}
