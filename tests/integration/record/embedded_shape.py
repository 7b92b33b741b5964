"""A random Qwen3-MoE of the shape of the model that ships with the project."""

from __future__ import annotations

from pathlib import Path

NUM_EXPERTS = 32
TOP_K = 2
NUM_LAYERS = 4
VOCABULARY = 4096


def build(directory: Path, dtype_name: str) -> None:
    """Writes the checkpoint."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # Larger than usual: experts that differ, and sums that a wrong scale would show.
        initializer_range=0.1,
    )
    transformers.Qwen3MoeForCausalLM(config).to(getattr(torch, dtype_name)).save_pretrained(directory)
