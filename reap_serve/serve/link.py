"""The server's link to its engines: control of all ranks, the latest reading of them, and the loaded plans.

Under data parallelism there are several engines behind one server; what is said here of "the engine" is done in all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from reap_serve.errors import EngineError
from reap_serve.record.settings import BASE_PLAN, ObserveSettings
from reap_serve.serve.join_status import join_layers
from reap_serve.serve.live_status import LayerBalance, MaskReport, PlanEntry, RankStatus
from reap_serve.shown_text import shown_logger

logger = shown_logger("reap_serve")

RPC_SECONDS = 60.0
# Running engines take a forward pass or two to measure what they hold.
FLUSH_ATTEMPTS, ATTEMPTS_UNTIL_IDLE, FLUSH_PAUSE_SECONDS = 40, 3, 0.05


class Engine(Protocol):
    """The engines behind the server, as `adapter.server.ServedEngine` has them."""

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[object, ...] = (), kwargs: None = None
    ) -> Sequence[object]:
        """Runs a method on every worker of every engine."""

    async def wake(self) -> None:
        """Has every engine run a forward pass."""


class EngineLink:
    """Speaks to the workers of all engines of one server.

    The workers hold the plans and the default: with several API servers each reads them from there, so that a change
    made through one reaches the others within `metrics_seconds`.

    Args:
        engine: The engines.
        settings: What the engine was started with.
    """

    def __init__(self, engine: Engine, settings: ObserveSettings) -> None:
        self.settings = settings
        self.ranks: tuple[RankStatus, ...] = ()
        self.listeners: list[Callable[[Sequence[RankStatus]], None]] = []
        self._engine = engine
        self._changing = asyncio.Lock()
        self._timer: asyncio.Task[None] | None = None

    @property
    def mask(self) -> MaskReport:
        """The plans, as of the latest reading."""
        return self.ranks[0].mask

    @property
    def layers(self) -> tuple[LayerBalance, ...]:
        """Balance of all layers, as of the latest reading."""
        return join_layers(self.ranks)

    def resolve(self, name: str | None) -> str | None:
        """The id of a request's plan: by name, or the default; None for the full model.

        Raises:
            KeyError: No plan has that name.
        """
        chosen = self.mask.default if name is None else name
        return None if chosen is None or chosen == BASE_PLAN else self.mask.plans[chosen].id

    async def refresh(self, *, tick: bool = False) -> None:
        """Reads the workers; with `tick` they also do what an idle engine has to do now and then."""
        self.ranks = await self._statuses("reap_tick" if tick else "reap_status")
        for listener in self.listeners:
            listener(self.ranks)

    async def control(self, action: str) -> None:
        """`start`, `stop`, `reset` or `flush` on every worker.

        Raises:
            EngineError: Names the engines that did not answer.
        """
        if action == "flush":
            await self._flush()
        else:
            await self._call(f"reap_{action}")
        await self.refresh()

    async def end(self) -> None:
        """Writes what was recorded so far, then tells every worker that the server ends in order.

        Raises:
            EngineError: As `control`; the workers hear of no orderly end.
        """
        await self._flush()
        await self._call("reap_farewell")

    async def _flush(self) -> None:
        """Writes what was recorded so far; engines that can only measure in a forward pass are given one if idle."""
        for attempt in range(FLUSH_ATTEMPTS):
            if all(await self._call("reap_flush")):
                return
            if attempt == ATTEMPTS_UNTIL_IDLE:
                await asyncio.wait_for(self._engine.wake(), RPC_SECONDS)
            else:
                await asyncio.sleep(FLUSH_PAUSE_SECONDS)
        raise EngineError(
            "an engine still holds tokens that it could not measure", "ask again when it answers requests"
        )

    async def load_plan(
        self, name: str, entry: PlanEntry, kept: Mapping[int, Sequence[int]], *, activate: bool
    ) -> str | None:
        """Loads a checked plan and may make it the default.

        Returns:
            What is wrong, None when nothing is.
        """
        by_layer = {str(layer): list(ids) for layer, ids in kept.items()}
        async with self._changing:
            arguments = (name, entry.model_dump(mode="json"), by_layer)
            problem = await self._change("reap_load_plan", *arguments)
            if problem is None and activate:
                problem = await self._change("reap_set_default", name)
            await self.refresh()
        return problem

    async def choose(self, name: str | None) -> str | None:
        """Makes a loaded plan, or with None the full model, the default; gives what is wrong."""
        async with self._changing:
            problem = await self._change("reap_set_default", name)
            await self.refresh()
        return problem

    async def forget(self, name: str) -> None:
        """Takes a plan's name away."""
        async with self._changing:
            await self._call("reap_forget_plan", name)
            await self.refresh()

    def start_timer(self) -> None:
        """Reads the workers every `metrics_seconds` until the engine is gone."""
        self._timer = asyncio.get_running_loop().create_task(self._tick_for_ever())

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.metrics_seconds)
            try:
                await self.refresh(tick=True)
            except Exception as error:  # noqa: BLE001 - the server's own checks tell of a dead engine
                logger.warning("the engine could not be read: %s: %s", type(error).__name__, error)

    async def _statuses(self, method: str) -> tuple[RankStatus, ...]:
        replies = await self._call(method)
        return tuple(RankStatus.model_validate(reply) for reply in replies)

    async def _change(self, method: str, *arguments: object) -> str | None:
        replies = await self._call(method, *arguments)
        return next((str(reply) for reply in replies if reply is not None), None)

    async def _call(self, method: str, *arguments: object) -> Sequence[object]:
        return await self._engine.collective_rpc(method, timeout=RPC_SECONDS, args=arguments)
