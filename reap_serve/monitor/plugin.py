"""Entry point of `vllm.endpoint_plugins`: metrics of ours on vLLM's /metrics.

Loaded when `VLLM_PLUGINS` names `reap_serve_metrics`, after `reap_serve`, whose readings it exports.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reap_serve import __version__
from reap_serve.adapter import engine_view, seams
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
        if not isinstance(link, EngineLink) or engine_view.api_server_rank(engine_client.vllm_config) > 0:
            return
        exporter = Exporter()
        planned = _served_plan(getattr(state, "reap_model", None))
        build = (__version__, seams.vllm_version() or "", str(engine_client.vllm_config.model_config.model))

        def export(ranks: Sequence[RankStatus]) -> None:
            tokens = engine_view.kv_cache_tokens(engine_client.vllm_config)
            exporter.export(Reading(ranks, link.layers, tokens, planned, build))

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
