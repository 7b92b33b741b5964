"""Control of the recorders over vLLM's `collective_rpc`: mixed into the worker by `--worker-extension-cls`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from reap_serve.adapter.fit import fit_problems
from reap_serve.adapter.seams import step_hooks
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.records import JsonValue, Record

WORKER_EXTENSION = "reap_serve.adapter.worker.ReapWorkerExtension"


class Rank(Protocol):
    """What follows the steps of one engine process, as it is controlled from outside.

    Attributes:
        recorder: Its recorders.
    """

    recorder: StepRecorder

    def reset(self) -> None:
        """Starts a new window with sums of nothing."""

    def flush(self) -> bool:
        """Writes what was recorded so far; False where some of it is measured at the next forward pass only."""

    def farewell(self) -> None:
        """The server ends in order; all was written."""

    def status(self) -> Record:
        """What it is doing."""

    def tick(self) -> None:
        """Does what an idle engine has to do now and then."""

    def load_plan(self, name: str, entry: Mapping[str, JsonValue], kept: Mapping[int, Sequence[int]]) -> None:
        """Loads a plan under a name; ValueError says why it cannot."""

    def load_masks(self, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        """Puts masks in the place of all plans; ValueError says why it cannot."""

    def take_gates(self) -> bytes:
        """The watched gates since the last call."""

    def forget_plan(self, name: str) -> None:
        """Takes a name away."""

    def set_default(self, name: str | None) -> None:
        """The plan of requests that name none; ValueError when there is no such plan."""


class ReapWorkerExtension:
    """Methods that every worker answers between two steps; arguments and results are JSON values and bytes."""

    def reap_start(self) -> None:
        """Records from the next step on."""
        self._reap_live().recorder.start()

    def reap_stop(self) -> None:
        """Records no more; what was recorded stays."""
        self._reap_live().recorder.stop()

    def reap_reset(self) -> None:
        """Starts a new window with sums of nothing."""
        self._reap_live().reset()

    def reap_flush(self) -> bool:
        """Writes what was recorded so far; False asks to be called again after the engine's next forward pass."""
        return self._reap_live().flush()

    def reap_farewell(self) -> None:
        """The server ends in order, and every rank has written what it recorded."""
        self._reap_live().farewell()

    def reap_settle(self) -> bool:
        """Measures what is held back; False as in `reap_flush`."""
        return self._reap_live().recorder.settle()

    def reap_snapshot(self) -> bytes:
        """This rank's sums of the window: `RankSums.to_bytes`."""
        return self._reap_live().recorder.snapshot().to_bytes()

    def reap_status(self) -> dict[str, JsonValue]:
        """What this rank is doing: `RankStatus`."""
        return self._reap_live().status().model_dump(mode="json")

    def reap_tick(self) -> dict[str, JsonValue]:
        """Does what an idle engine has to do now and then, and gives the status."""
        self._reap_live().tick()
        return self.reap_status()

    def reap_load_plan(self, name: str, entry: dict[str, JsonValue], kept: dict[str, list[int]]) -> str | None:
        """Loads a checked plan: its name, its `PlanEntry`, and the kept experts by layer index.

        Returns:
            What is wrong, None when nothing is.
        """
        try:
            self._reap_live().load_plan(name, entry, {int(layer): ids for layer, ids in kept.items()})
        except ValueError as error:
            return str(error)
        return None

    def reap_load_masks(self, masks: dict[str, dict[str, list[int]]]) -> str | None:
        """Replaces all plans by checked masks: their ids, and the kept experts by layer index.

        Returns:
            What is wrong, None when nothing is.
        """
        try:
            by_layer = {plan: {int(layer): ids for layer, ids in kept.items()} for plan, kept in masks.items()}
            self._reap_live().load_masks(by_layer)
        except ValueError as error:
            return str(error)
        return None

    def reap_take_gates(self) -> bytes:
        """The watched gates since the last call: `gate_watch.read_gates` reads them."""
        return self._reap_live().take_gates()

    def reap_forget_plan(self, name: str) -> None:
        """Takes a plan's name away."""
        self._reap_live().forget_plan(name)

    def reap_set_default(self, name: str | None) -> str | None:
        """Chooses the plan of requests that name none; gives what is wrong, None when nothing is."""
        try:
            self._reap_live().set_default(name)
        except ValueError as error:
            return str(error)
        return None

    def _reap_live(self) -> Rank:
        hooks = step_hooks(self.model_runner)  # type: ignore[attr-defined]
        if hooks is None:
            misfits = "; ".join(fit_problems())
            reason = f"vLLM does not fit: {misfits}" if misfits else "--additional-config has no reap_serve"
            raise RuntimeError(f"observation is not enabled: {reason}")
        return cast(Rank, hooks)
