"""Which model a directory holds, and whether it holds all of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from reap_serve.errors import InputFileError, MismatchError
from reap_serve.model import fingerprint, open_model, require_same_model, require_whole_weights

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that names a model and holds one tensor."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": np.arange(4096, dtype=np.float32)}, path / "model.safetensors")
    return path


def test_a_fingerprint_says_what_the_configuration_says(model: Path) -> None:
    found = fingerprint(open_model(str(model)))
    assert (found.architecture, found.num_layers, found.num_experts, found.top_k) == ("qwen3_moe", 2, 4, 2)
    assert (found.dtype, found.quantization) == ("bfloat16", None)


def test_other_weights_are_another_model(model: Path) -> None:
    before = fingerprint(open_model(str(model)))
    save_file({"w": np.arange(1, 4097, dtype=np.float32)}, model / "model.safetensors")
    after = fingerprint(open_model(str(model)))
    with pytest.raises(MismatchError, match="one and two belong to different models: weights_sha256 is"):
        require_same_model(before, after, "one", "two")


def test_a_note_of_the_writer_makes_no_other_model(model: Path) -> None:
    before = fingerprint(open_model(str(model)))
    (model / "config.json").write_text(json.dumps(CONFIG | {"transformers_version": "9", "_name_or_path": "x"}))
    assert fingerprint(open_model(str(model))) == before


def test_whole_weights_pass_and_truncated_ones_are_refused(model: Path) -> None:
    source = open_model(str(model))
    require_whole_weights(source)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputFileError, match=r"model\.safetensors is truncated or corrupt: .*; download it again"):
        require_whole_weights(source)


def test_a_path_that_is_no_text_is_refused_before_an_engine(model: Path) -> None:
    link = model.with_name(os.fsdecode(b"m\xff"))
    link.symlink_to(model)
    source = open_model(str(link))
    # What only reads bytes takes it.
    assert fingerprint(source) == fingerprint(open_model(str(model)))
    with pytest.raises(InputFileError, match="open no path that is not UTF-8; rename the folder, or link to it"):
        require_whole_weights(source)


def test_a_missing_model_is_one_line() -> None:
    with pytest.raises(InputFileError, match=r"model \./nowhere does not exist; give a local directory"):
        open_model("./nowhere")
