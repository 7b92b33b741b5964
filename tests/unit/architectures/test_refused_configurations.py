"""Configurations without a sound Mixture-of-Experts model are refused, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from reap_serve.architectures.resolve import resolve
from reap_serve.errors import ArchitectureError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type None is not"),
        ({"model_type": ["a"]}, "is not a Mixture-of-Experts family"),
        ({"model_type": "llama"}, "known are afmoe"),
        ({"model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64]}, "a router for text and one for images"),
        ({"model_type": "nemotron_h_puzzle", "block_configs": []}, "nemotron_h_puzzle cannot be pruned: each of its"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 1}, "names no routed experts"),
        ({"model_type": "qwen3_moe", "num_experts": "8"}, "outside"),
        ({"model_type": "qwen3_moe", "num_experts": [8, 4]}, "different counts"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "num_hidden_layers is 0"),
        ({"model_type": "qwen3_moe", "num_experts": 8, "num_hidden_layers": 2}, "none of num_experts_per_tok"),
        (
            {"model_type": "qwen3_moe", "num_experts": 8, "num_hidden_layers": 2, "num_experts_per_tok": 2}
            | {"decoder_sparse_step": 0},
            "decoder_sparse_step is 0",
        ),
        (
            {"model_type": "gemma4", "num_experts": 8, "num_hidden_layers": 2, "top_k_experts": 2},
            "the model is dense",
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 8, "num_hidden_layers": 2, "num_experts_per_tok": 2}
            | {"n_group": 3, "topk_group": 1},
            "3 groups of unequal size",
        ),
        (
            {"model_type": "mellum", "num_experts": 8, "num_hidden_layers": 2, "num_experts_per_tok": 2}
            | {"mlp_layer_types": ["sparse"]},
            "describes 1 of 2 layers",
        ),
    ],
)
def test_wrong_configurations_are_refused(config: Mapping[str, object], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        resolve(config).limits(config)  # type: ignore[arg-type]
