"""What is read of layers and configurations, on vLLM's own classes."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from reap_serve.adapter import engine_view, layer_view


def layer_of(function: Any) -> Any:
    """A layer whose router calls a function."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    return SimpleNamespace(router=CPURouter(top_k=1, global_num_experts=2, custom_routing_function=function))


def test_a_function_of_the_transformers_backend_routes_in_the_model() -> None:
    from vllm.model_executor.models.transformers import moe

    def hf_topk_router(hidden_states: Any, gating_output: Any, topk: int, renormalize: bool, gate: Any) -> None:
        """As vLLM 0.33 has it."""

    hf_topk_router.__module__ = moe.__name__
    assert layer_view.routes_in_model(layer_of(functools.partial(hf_topk_router, gate=None)))
    assert layer_view.routes_in_model(layer_of(functools.partial(functools.partial(hf_topk_router, gate=None))))
    assert layer_view.routes_in_model(layer_of(hf_topk_router))
    assert not layer_view.routes_in_model(layer_of(functools.partial(max, 1)))
    assert not layer_view.routes_in_model(layer_of(None))


@pytest.mark.parametrize(
    ("on_cpu", "mode", "captures"),
    [
        (False, "FULL", True),
        (False, "PIECEWISE", True),
        (False, "NONE", False),
        (False, None, True),
        (True, None, False),
    ],
)
def test_a_graph_mode_that_is_not_settled_may_become_one(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, mode: str | None, captures: bool
) -> None:
    from vllm import platforms
    from vllm.config import CUDAGraphMode

    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
    settled = None if mode is None else CUDAGraphMode[mode]
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=settled))
    assert engine_view.captures_graphs(config) == captures


def test_rows_are_as_wide_as_what_the_kernel_is_given() -> None:
    """gpt-oss on SM100: 2,880 columns, of which the kernel makes 3,072 itself."""
    import torch

    config = SimpleNamespace(hidden_dim=3072, hidden_dim_unpadded=2880, experts_per_token=4, in_dtype=torch.bfloat16)
    for pads_itself, hidden in ((True, 2880), (False, 3072)):
        method = SimpleNamespace(skip_forward_padding=pads_itself)
        layer: Any = SimpleNamespace(moe_config=config, routed_experts=SimpleNamespace(quant_method=method))
        assert layer_view.row_shape(layer).hidden == hidden


def test_measured_calls_are_finalized() -> None:
    """DeepSeek-V4.1 under tensor parallelism leaves the sum over experts to the layer behind."""
    from reap_serve.adapter.kernel_class import finalized

    config: Any = SimpleNamespace(_defer_moe_finalize=True)
    with finalized(config):
        assert not config._defer_moe_finalize
    assert config._defer_moe_finalize
