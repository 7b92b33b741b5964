"""An engine as `refuse_unsound` reads it: nothing is wrong with it, but for what a test changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from reap_serve.adapter import engine_view, layer_view, refusals
from reap_serve.adapter.refusals import refuse_unsound
from reap_serve.record.settings import ObserveSettings


def config(speculative: object = None, **parallel: object) -> Any:
    settings: dict[str, object] = {
        "enable_eplb": False,
        "data_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "all2all_backend": "allgather_reducescatter",
        "use_ubatching": False,
    }
    fast_prefill = parallel.pop("kv_sharing_fast_prefill", False)
    return SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(**(settings | parallel)),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
    )


class Kernel:
    """A kernel that adds rows where nothing can be read."""


class Layer(SimpleNamespace):
    """A layer that nothing is wrong with, but for what a test changes."""

    def __init__(
        self,
        *,
        monolithic: bool = False,
        reduces: bool = False,
        kernel: object = None,
        expert_map: object = None,
        **change: object,
    ) -> None:
        method = SimpleNamespace(is_monolithic=monolithic, moe_kernel=SimpleNamespace(fused_experts=kernel or Kernel()))
        plain: dict[str, object] = {
            "layer_name": "model.layers.0.mlp.experts",
            "router": object(),
            "routed_experts": SimpleNamespace(quant_method=method, expert_map=expert_map),
            "routed_output_transform": None,
            "reduces": reduces,
            "in_model": False,
        }
        super().__init__(**(plain | change))


@dataclass(frozen=True)
class Engine:
    """An engine on a device.

    Attributes:
        device: Of PyTorch.
        graphs: Whether CUDA graphs are captured.
        settings: What is asked of it.
        config: vLLM's.
        layer: Its only one.
        compiled: Whether vLLM compiles the model.
    """

    device: str = "cuda"
    graphs: bool = True
    settings: ObserveSettings = field(default_factory=ObserveSettings)
    config: Any = field(default_factory=config)
    layer: Layer = field(default_factory=Layer)
    compiled: bool = False

    def start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Refuses it, or does not; families and their defects are another test's."""
        from vllm.platforms import current_platform

        reducing = layer_view.reducing_kernel
        with monkeypatch.context() as patch:
            patch.setattr(engine_view, "captures_graphs", lambda vllm_config: self.graphs)
            patch.setattr(engine_view, "traces_graphs", lambda vllm_config: self.compiled)
            patch.setattr(engine_view, "device_type", lambda: self.device)
            patch.setattr(layer_view, "routes_in_model", lambda layer: layer.in_model)
            patch.setattr(layer_view, "reducing_kernel", lambda layer: layer if layer.reduces else reducing(layer))
            patch.setattr(refusals, "refuse_misrouted_layers", lambda vllm_config, layers: None)
            patch.setattr(refusals, "refuse_ungathered_rows", lambda size: None)
            patch.setattr(type(current_platform), "is_cpu", lambda platform: self.device == "cpu")
            layers: Any = [self.layer]
            refuse_unsound(self.settings, self.config, layers)
