"""The patched Laguna leads the correction bias to a parameter that its router shares; the installed one drops it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

pytest.importorskip("vllm")

BIAS = "layers.3.mlp.experts.e_score_correction_bias"


@pytest.fixture
def patched(load_patched: Callable[[str, str], ModuleType]) -> ModuleType:
    return load_patched("0005-laguna-correction-bias.patch", "vllm/model_executor/models/laguna.py")


def test_the_bias_leaves_the_experts(patched: ModuleType) -> None:
    names = [BIAS, "layers.3.mlp.experts.7.up_proj.weight", "layers.3.self_attn.q_proj.weight"]
    assert patched.LagunaModel.hf_to_vllm_mapper.apply_list(names) == [
        "layers.3.mlp.e_score_correction_bias",
        "layers.3.mlp.experts.7.up_proj.weight",
        "layers.3.self_attn.qkv_proj.weight",
    ]


def test_the_installed_one_has_the_defect() -> None:
    """Fails when vLLM has mended it: the patch's Remove-when."""
    from reap_serve.adapter.probes import laguna_bias_is_dropped

    assert laguna_bias_is_dropped()
