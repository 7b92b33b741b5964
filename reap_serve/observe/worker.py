"""Control of the observers over vLLM's `collective_rpc`: mixed into the worker by `--worker-extension-cls`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap_serve.observe.engine import Observer

WORKER_EXTENSION = "reap_serve.observe.worker.ReapWorkerExtension"


class ReapWorkerExtension:
    """Methods that every worker answers; arguments and results are JSON values and bytes."""

    def reap_start(self) -> None:
        """Records from the next step on."""
        self._reap_observer().start()

    def reap_stop(self) -> None:
        """Records no more; what was recorded stays."""
        self._reap_observer().stop()

    def reap_reset(self) -> None:
        """Starts a new window with sums of nothing."""
        self._reap_observer().reset()

    def reap_snapshot(self) -> bytes:
        """This rank's sums: `RankSums.to_bytes`."""
        return self._reap_observer().snapshot().to_bytes()

    def _reap_observer(self) -> Observer:
        observer = vars(self.model_runner).get("reap_observer")  # type: ignore[attr-defined]
        if observer is None:
            raise RuntimeError("observation is not enabled: --additional-config has no reap_serve")
        return observer  # type: ignore[no-any-return]
