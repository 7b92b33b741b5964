"""What vLLM's seams call in one engine process: layers are built, the model is loaded; its steps go to `LiveEngine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap_serve.adapter import engine_view, seams
from reap_serve.adapter.refusals import refuse_unsound
from reap_serve.adapter.tap import add_tap
from reap_serve.adapter.wiring import facts_of, wire
from reap_serve.record.requests import Requests
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.serve.live import LiveEngine
from reap_serve.serve.live_build import build_live, build_masks
from reap_serve.serve.mask_router import add_routing_hook, set_routing_hook

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class _Hooks:
    """Gives every layer its tap and every engine its recorders."""

    def layer_built(self, layer: MoERunner, vllm_config: VllmConfig) -> None:
        settings = seams.settings_of(vllm_config)
        assert settings is not None
        add_tap(layer)
        add_routing_hook(layer, traced=engine_view.traces_graphs(vllm_config))

    def model_loaded(self, model_runner: GPUModelRunner, vllm_config: VllmConfig) -> LiveEngine:
        settings = seams.settings_of(vllm_config)
        assert settings is not None
        layers = engine_view.moe_layers(vllm_config)
        refuse_unsound(settings, vllm_config, layers)
        requests = Requests(settings.max_slices)
        recorder = StepRecorder(
            settings,
            [facts_of(layer, settings) for layer in layers],
            model_runner.device,
            vllm_config.parallel_config.tensor_parallel_size,
            requests,
            engine_view.max_rows(vllm_config),
        )
        wire(layers, recorder)
        for layer, tap in zip(layers, recorder.logit_taps, strict=False):
            set_routing_hook(layer, tap)
        masks = build_masks(settings, layers, model_runner.device, requests)
        return build_live(settings, layers, model_runner, requests, recorder, masks)


HOOKS: seams.EngineHooks = _Hooks()
