"""What a serving engine gets when its model is loaded, and why some of it may be refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reap_serve.adapter import engine_view
from reap_serve.errors import EngineError, ReapServeError
from reap_serve.model import fingerprint, open_model
from reap_serve.record.requests import Requests
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.serve.live import LiveEngine, LiveSetup, RankFacts
from reap_serve.serve.mask import EngineMasks
from reap_serve.serve.mask_router import SkippedRouting
from reap_serve.serve.shadow import EngineShadow
from reap_serve.serve.sidecar import read_sidecar

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def build_masks(
    settings: ObserveSettings, layers: list[MoERunner], device: torch.device, requests: Requests
) -> EngineMasks:
    """Room for plans; none is loaded."""
    return EngineMasks(layers, device, requests, settings.drift_fraction)


def build_live(
    settings: ObserveSettings,
    layers: list[MoERunner],
    model_runner: GPUModelRunner,
    requests: Requests,
    recorder: StepRecorder,
    masks: EngineMasks,
) -> LiveEngine:
    """The live side of one rank.

    Raises:
        EngineError: Statistics are to be written, and the engine is expert-parallel.
        ReapServeError: Statistics are to be written, and the model on disk has no fingerprint.
    """
    config = model_runner.vllm_config
    graphs = _graph_refusal(config)
    shadow, shadow_refusal = None, graphs
    if graphs is None and settings.drift_fraction > 0:
        shadow, shadow_refusal = _build_shadow(settings, layers, model_runner, requests)
    return LiveEngine(
        requests,
        recorder,
        masks,
        shadow,
        _setup(settings, config, layers),
        RankFacts(
            mask_refusal=graphs or _transformers_refusal(layers),
            shadow_refusal=shadow_refusal,
            weights_bytes=_weights_bytes(model_runner),
        ),
        SkippedRouting(layers) if engine_view.traces_graphs(config) else None,
    )


def _setup(settings: ObserveSettings, config: VllmConfig, layers: list[MoERunner]) -> LiveSetup | None:
    if settings.directory is None:
        return None
    if layers[0].routed_experts.expert_map is not None:
        raise EngineError(
            "expert-parallel ranks hold experts of their own, and their files cannot be told from repetitions yet",
            "serve without --enable-expert-parallel, or without a directory for statistics",
        )
    # Tensor-parallel ranks measure the same complete rows: one of them writes.
    if engine_view.tensor_parallel_rank() > 0:
        return None
    return LiveSetup(
        model=fingerprint(open_model(engine_view.model_reference(config))),
        engine=engine_view.engine_header(config),
        directory=settings.directory,
        flush_seconds=settings.flush_seconds,
        minimum_tokens=settings.minimum_tokens,
    )


def _build_shadow(
    settings: ObserveSettings, layers: list[MoERunner], model_runner: GPUModelRunner, requests: Requests
) -> tuple[EngineShadow | None, str | None]:
    """The shadow routers, or None and why there are none; serving goes on without them."""
    try:
        full = read_sidecar(Path(open_model(engine_view.model_reference(model_runner.vllm_config)).path))
        if full is None:
            return None, None
        shadow = EngineShadow(layers, full, model_runner.device, requests, settings.drift_fraction)
    except (ReapServeError, KeyError, RuntimeError) as error:
        return None, f"the sidecar cannot be used: {error}"
    return shadow, None


def _graph_refusal(config: VllmConfig) -> str | None:
    if engine_view.captures_graphs(config):
        return "CUDA graphs replay the routing without its Python; start vLLM with --enforce-eager"
    return None


def _transformers_refusal(layers: list[MoERunner]) -> str | None:
    if any(engine_view.routes_in_model(layer) for layer in layers):
        return "the Transformers backend routes inside the model, before a mask could act"
    return None


def _weights_bytes(model_runner: GPUModelRunner) -> int:
    """Bytes of the weights: as vLLM measured them on a GPU, else the tensors that the model's modules hold."""
    measured = getattr(model_runner, "model_memory_usage", 0)
    if measured:
        return int(measured)
    storages: dict[int, int] = {}
    for module in model_runner.model.modules():
        own = (value for value in vars(module).values() if isinstance(value, torch.Tensor))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *own):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
