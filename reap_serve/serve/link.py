"""The server's link to its engine: control of all ranks, the latest reading of them, and the loaded plans."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from reap_serve.record.settings import BASE_PLAN, ObserveSettings
from reap_serve.serve.live_status import LayerBalance, MaskReport, PlanEntry, RankStatus
from reap_serve.shown_text import shown_logger

logger = shown_logger("reap_serve")

RPC_SECONDS = 60.0


class Engine(Protocol):
    """The part of vLLM's `EngineClient` that is used here."""

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[object, ...] = (), kwargs: None = None
    ) -> Sequence[object]:
        """Runs a method on every worker."""


class EngineLink:
    """Speaks to the workers of one engine.

    The workers hold the plans and the default: with several API servers each reads them from there, so that a change
    made through one reaches the others within `metrics_seconds`.

    Args:
        engine: vLLM's client.
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
        """Balance of all layers: pipeline ranks bring their own, tensor-parallel ones repeat them."""
        found = {balance.layer: balance for rank in reversed(self.ranks) for balance in rank.layers}
        return tuple(found[layer] for layer in sorted(found))

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
        """`start`, `stop`, `reset` or `flush` on every worker."""
        await self._engine.collective_rpc(f"reap_{action}", timeout=RPC_SECONDS)
        await self.refresh()

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
            await self._engine.collective_rpc("reap_forget_plan", timeout=RPC_SECONDS, args=(name,))
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
        replies = await self._engine.collective_rpc(method, timeout=RPC_SECONDS)
        return tuple(RankStatus.model_validate(reply) for reply in replies)

    async def _change(self, method: str, *arguments: object) -> str | None:
        replies = await self._engine.collective_rpc(method, timeout=RPC_SECONDS, args=arguments)
        return next((str(reply) for reply in replies if reply is not None), None)
