"""Entry point of `vllm.endpoint_plugins`: loaded when `VLLM_PLUGINS` names `reap_serve`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_serve.adapter.metadata_slice import read_slices_of_metadata
from reap_serve.adapter.server import ServedEngine
from reap_serve.errors import EngineError, ReapServeError
from reap_serve.plan.record import read_plan
from reap_serve.serve.ending import Ending
from reap_serve.serve.last_flush import flush_before_shutdown
from reap_serve.serve.link import EngineLink
from reap_serve.serve.mask_admission import SALT_PREFIX, settle
from reap_serve.serve.plan_check import ServedModel, check_plan, served_model
from reap_serve.serve.routes import router
from reap_serve.shown_text import shown_logger

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

logger = shown_logger("reap_serve")


class ReapEndpoints:
    """Routes under /v1/reap, the admission of requests, and the timer that reads the engine."""

    name = "reap_serve"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; without observation they answer 503."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Reads the engine, loads the plans of its configuration, and puts the admission in place, before any request.

        Raises:
            ReapServeError: A plan does not fit; the server does not start.
        """
        if engine_client is None:
            return
        engine = ServedEngine(engine_client)
        settings = engine.settings
        if settings is None:
            return
        link = EngineLink(engine, settings)
        model = _served_model(engine.model_reference)
        await link.refresh()
        for name, path in settings.plans.items():
            if not isinstance(model, ServedModel):
                raise EngineError(f"plan {name} cannot be checked: {model}", "start without plans")
            checked = check_plan(read_plan(Path(path)), model, path, settings.mask_phase)
            if (problem := await link.load_plan(name, checked.entry, checked.kept, activate=False)) is not None:
                raise EngineError(f"plan {name} cannot be used: {problem}", "start without plans")
        if settings.mask is not None and (problem := await link.choose(settings.mask)) is not None:
            raise EngineError(problem, "name a plan among `plans`")
        read_slices_of_metadata()
        engine.install_admission(lambda arguments: settle(arguments, link.resolve), SALT_PREFIX)
        if settings.directory is not None:
            engine.before_shutdown(lambda shutdown: flush_before_shutdown(shutdown, link))
        Ending(engine).install()
        link.start_timer()
        state.reap_link, state.reap_model = link, model


def _served_model(reference: str) -> ServedModel | str:
    try:
        return served_model(reference)
    except ReapServeError as error:
        logger.warning("plans cannot be checked against the served model: %s", error)
        return str(error)
