"""Control of the recorders over vLLM's `collective_rpc`: mixed into the worker by `--worker-extension-cls`."""

from __future__ import annotations

from reap_serve.adapter import seams
from reap_serve.records import JsonValue
from reap_serve.serve.live import LiveEngine
from reap_serve.serve.live_status import PlanEntry

WORKER_EXTENSION = "reap_serve.adapter.worker.ReapWorkerExtension"


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

    def reap_flush(self) -> None:
        """Writes what was recorded so far."""
        self._reap_live().flush()

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
            by_layer = {int(layer): ids for layer, ids in kept.items()}
            self._reap_live().load_plan(name, PlanEntry.model_validate(entry), by_layer)
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
        return self._reap_live().masks.watch.take()

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

    def _reap_live(self) -> LiveEngine:
        live = seams.step_hooks(self.model_runner)  # type: ignore[attr-defined]
        if not isinstance(live, LiveEngine):
            raise RuntimeError("observation is not enabled: --additional-config has no reap_serve")
        return live
