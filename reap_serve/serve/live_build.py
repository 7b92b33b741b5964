"""What a serving engine gets when its model is loaded, and why some of it may be refused."""

from __future__ import annotations

from pathlib import Path

from reap_serve.adapter.loaded import LoadedEngine
from reap_serve.errors import ReapServeError
from reap_serve.model import fingerprint, open_model
from reap_serve.plan.record import read_plan
from reap_serve.record.requests import Requests
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.serve.graph_mask import REMEDY, GraphMasks
from reap_serve.serve.live import LiveEngine, RankFacts
from reap_serve.serve.mask import EngineMasks
from reap_serve.serve.plan_check import check_plan, served_model
from reap_serve.serve.shadow import EngineShadow
from reap_serve.serve.sidecar import read_sidecar
from reap_serve.serve.windows import LiveSetup


def build_live(engine: LoadedEngine, requests: Requests, recorder: StepRecorder) -> LiveEngine:
    """The live side of one rank.

    Raises:
        ReapServeError: Statistics are to be written, and the model on disk has no fingerprint.
    """
    graphs = _graph_refusal(engine)
    drift_fraction = engine.settings.drift_fraction
    masks = _build_masks(engine, requests)
    shadow, shadow_refusal = None, graphs
    if graphs is None and drift_fraction > 0:
        shadow, shadow_refusal = _build_shadow(engine, requests)
    return LiveEngine(
        requests,
        recorder,
        masks,
        shadow,
        _setup(engine),
        RankFacts(
            mask_refusal=_model_refusal(engine) or (None if isinstance(masks, GraphMasks) else _late_plans(engine)),
            shadow_refusal=shadow_refusal,
            weights_bytes=engine.weights_bytes(),
            engine=engine.number,
        ),
        engine.skipped_routing,
    )


def _build_masks(engine: LoadedEngine, requests: Requests) -> EngineMasks:
    """What routes by plans; under graphs those that the engine was started with.

    Raises:
        ReapServeError: A plan is none for this model.
    """
    settings = engine.settings
    common = engine.routed_layers, engine.device, requests, settings.drift_fraction
    if not engine.captures_graphs or not settings.plans or engine.routes_in_model:
        return EngineMasks(*common)
    model = served_model(engine.model_reference)
    checked = [
        check_plan(read_plan(Path(path)), model, name, settings.mask_phase) for name, path in settings.plans.items()
    ]
    plans = {each.entry.id: each.kept for each in checked}
    return GraphMasks(*common, engine.max_rows, plans, answer_only=settings.mask_phase == "decode")


def _late_plans(engine: LoadedEngine) -> str | None:
    if engine.captures_graphs:
        return f"CUDA graphs were captured without plans; {REMEDY}"
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
    )


def _build_shadow(engine: LoadedEngine, requests: Requests) -> tuple[EngineShadow | None, str | None]:
    """The shadow routers, or None and why there are none; serving goes on without them."""
    try:
        full = read_sidecar(Path(open_model(engine.model_reference).path))
        if full is None:
            return None, None
        shadow = EngineShadow(engine.routed_layers, full, engine.device, requests, engine.settings.drift_fraction)
    except (ReapServeError, KeyError, RuntimeError) as error:
        return None, f"the sidecar cannot be used: {error}"
    return shadow, None


def _graph_refusal(engine: LoadedEngine) -> str | None:
    if engine.captures_graphs:
        return "CUDA graphs replay the routing without its Python; start vLLM with --enforce-eager"
    return None


def _model_refusal(engine: LoadedEngine) -> str | None:
    if engine.routes_in_model:
        return "the Transformers backend routes inside the model, before a mask could act"
    return None
