"""Which expert count the patched qwen3_moe gives a layer."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("vllm")


@pytest.fixture
def patched(load_patched: Callable[[str, str], ModuleType]) -> ModuleType:
    return load_patched("0004-qwen3-moe-layer-counts.patch", "vllm/model_executor/models/qwen3_moe.py")


def config(**more: object) -> SimpleNamespace:
    return SimpleNamespace(num_experts=8, num_experts_per_tok=2, num_hidden_layers=3, **more)


def test_a_layer_has_its_own_count(patched: ModuleType) -> None:
    unequal = config(num_experts_per_layer=[0, 2, 8])
    assert [patched._num_experts(unequal, f"model.layers.{layer}.mlp") for layer in (1, 2)] == [2, 8]


@pytest.mark.parametrize("more", [{}, {"num_experts_per_layer": None}])
def test_without_a_list_all_have_one(patched: ModuleType, more: dict[str, object]) -> None:
    assert patched._num_experts(config(**more), "model.layers.1.mlp") == 8


@pytest.mark.parametrize(
    ("counts", "message"),
    [([8, 8], "2 entries for 3 layers"), ([8, 1, 8], "has 1 experts, outside 2..8"), ([8, 9, 8], "has 9 experts")],
)
def test_a_wrong_list_is_refused(patched: ModuleType, counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patched._num_experts(config(num_experts_per_layer=counts), "model.layers.1.mlp")
