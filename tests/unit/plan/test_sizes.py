"""Bytes from headers, against checkpoints whose tensors are counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from reap_serve.errors import InputFileError
from reap_serve.model import open_model
from reap_serve.plan.sizes import measure_checkpoint

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}


def checkpoint(directory: Path, num_experts: int = 4) -> Path:
    """Layer 0 is dense; an expert of layer 1 has 3 * 6 float32, a router row 3 float16."""
    tensors = {
        "model.embed_tokens.weight": np.zeros((10, 3), np.float32),
        "model.layers.0.mlp.gate_proj.weight": np.zeros((2, 3), np.float32),
        "model.layers.1.mlp.gate.weight": np.zeros((num_experts, 3), np.float16),
    }
    for expert in range(num_experts):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"model.layers.1.mlp.experts.{expert}.{projection}.weight"] = np.zeros((2, 3), np.float32)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def test_experts_are_told_from_the_rest(tmp_path: Path) -> None:
    measured = measure_checkpoint(open_model(str(checkpoint(tmp_path))))
    assert measured.fixed_bytes == 10 * 3 * 4 + 2 * 3 * 4
    assert measured.expert_bytes_L.tolist() == [3 * 6 * 4 + 3 * 2]
    assert measured.mtp_expert_bytes == 0


@pytest.mark.parametrize("kept", [2, 3])
def test_the_prediction_is_what_a_checkpoint_with_fewer_experts_has(tmp_path: Path, kept: int) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    predicted = measure_checkpoint(open_model(str(checkpoint(tmp_path / "whole")))).at_uniform(kept)
    cut = checkpoint(tmp_path / "cut", kept)
    header_bytes = 8 + int.from_bytes((cut / "model.safetensors").read_bytes()[:8], "little")
    assert predicted == (cut / "model.safetensors").stat().st_size - header_bytes


def test_only_files_of_the_index_count(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    before = measure_checkpoint(open_model(str(source))).at_uniform(4)
    save_file({"duplicate": np.zeros(100, np.float32)}, source / "consolidated.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert measure_checkpoint(open_model(str(source))).at_uniform(4) == before


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputFileError, match="is truncated"):
        measure_checkpoint(open_model(str(tmp_path)))


def test_a_router_smaller_than_the_config_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="too small for 4 experts on axis 0"):
        measure_checkpoint(open_model(str(checkpoint(tmp_path, 3))))
