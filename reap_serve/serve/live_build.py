"""What a serving engine gets when its model is loaded, and why some of it may be refused."""

from __future__ import annotations

from pathlib import Path

from reap_serve.adapter.loaded import LoadedEngine
from reap_serve.errors import ReapServeError
from reap_serve.model import fingerprint, open_model
from reap_serve.record.requests import Requests
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.serve.graph_mask import GraphMasks
from reap_serve.serve.graph_shadow import GraphShadow
from reap_serve.serve.live import LiveEngine, RankFacts
from reap_serve.serve.mask import EngineMasks
from reap_serve.serve.shadow import EngineShadow
from reap_serve.serve.sidecar import read_sidecar
from reap_serve.serve.windows import LiveSetup


def build_live(engine: LoadedEngine, requests: Requests, recorder: StepRecorder) -> LiveEngine:
    """The live side of one rank.

    Raises:
        ReapServeError: Statistics are to be written, and the model on disk has no fingerprint.
    """
    masks = _build_masks(engine, requests)
    shadow, shadow_refusal = _build_shadow(engine, requests)
    return LiveEngine(
        requests,
        recorder,
        masks,
        shadow,
        _setup(engine),
        RankFacts(
            mask_refusal=_mask_refusal(engine),
            shadow_refusal=shadow_refusal,
            weights_bytes=engine.weights_bytes(),
            engine=engine.number,
        ),
        engine.skipped_routing,
    )


def _build_masks(engine: LoadedEngine, requests: Requests) -> EngineMasks:
    """What routes by plans."""
    common = engine.routed_layers, engine.device, requests, engine.settings.drift_fraction
    places = engine.settings.places_in_graphs
    if not engine.captures_graphs or places == 0 or engine.routes_in_model:
        return EngineMasks(*common)
    return GraphMasks(*common, engine.max_rows, places)


def _mask_refusal(engine: LoadedEngine) -> str | None:
    """Why this engine cannot mask, None when it can."""
    if engine.routes_in_model:
        return "the Transformers backend routes inside the model, before a mask could act"
    if engine.captures_graphs and engine.settings.places_in_graphs == 0:
        return (
            "CUDA graphs were captured without places for plans; start with --mask-places N, or name plans with --plan "
            "NAME=PLAN at the start"
        )
    return None


def _setup(engine: LoadedEngine) -> LiveSetup | None:
    settings = engine.settings
    if settings.directory is None:
        return None
    # Tensor-parallel and expert-parallel ranks have the same sums: one of them writes.
    if engine.tensor_parallel_rank > 0:
        return None
    return LiveSetup(
        model=fingerprint(open_model(engine.model_reference)),
        engine=engine.header,
        directory=settings.directory,
        flush_seconds=settings.flush_seconds,
        minimum_tokens=settings.minimum_tokens,
        shared=engine.peers is not None,
    )


def _build_shadow(engine: LoadedEngine, requests: Requests) -> tuple[EngineShadow | None, str | None]:
    """The shadow routers, or None and why there are none; serving goes on without them."""
    fraction, graphs = engine.settings.drift_fraction, engine.graphs
    if fraction == 0:
        return None, None
    try:
        full = read_sidecar(Path(open_model(engine.model_reference).path))
        if full is None:
            return None, None
        common = engine.routed_layers, full, engine.device, requests, fraction
        return EngineShadow(*common) if graphs is None else GraphShadow(*common, graphs), None
    except (ReapServeError, KeyError, RuntimeError) as error:
        return None, f"the sidecar cannot be used: {error}"
