"""Entry point of `vllm.endpoint_plugins`: metrics of ours on vLLM's /metrics.

Loaded when `VLLM_PLUGINS` names `reap_serve_metrics`, after `reap_serve`, whose readings it exports.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reap_serve import __version__
from reap_serve.adapter.releases.check import vllm_version
from reap_serve.adapter.server import ServedEngine
from reap_serve.errors import ReapServeError
from reap_serve.monitor.metrics import Exporter, Reading
from reap_serve.prune.manifest import MANIFEST_NAME, read_manifest
from reap_serve.serve.link import EngineLink
from reap_serve.serve.live_status import RankStatus
from reap_serve.serve.plan_check import ServedModel, planned_gate_mass
from reap_serve.shown_text import shown_logger

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

logger = shown_logger("reap_serve")


class ReapMetrics:
    """Sets the metrics each time the engine is read."""

    name = "reap_serve_metrics"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds no route: vLLM's /metrics serves the registry."""

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Listens to the engine's readings; of several API servers only the first one does."""
        link = getattr(state, "reap_link", None)
        if not isinstance(link, EngineLink):
            return
        engine = ServedEngine(engine_client)
        if engine.api_server_rank > 0:
            return
        exporter = Exporter()
        planned = _served_plan(getattr(state, "reap_model", None))
        build = (__version__, vllm_version() or "", engine.model_name)

        def export(ranks: Sequence[RankStatus]) -> None:
            exporter.export(Reading(ranks, link.layers, engine.kv_cache_tokens, planned, build))

        link.listeners.append(export)
        await link.refresh()


def _served_plan(model: object) -> dict[str, float]:
    """The dropped gate mass that the plan of a served pruned checkpoint predicted, by slice."""
    if not isinstance(model, ServedModel) or not (model.path / MANIFEST_NAME).exists():
        return {}
    try:
        return planned_gate_mass(read_manifest(model.path).plan.summary)
    except ReapServeError as error:
        logger.warning("the plan of the served checkpoint cannot be read: %s", error)
        return {}
