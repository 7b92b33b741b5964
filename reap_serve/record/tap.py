"""A layer's recorder behind the boundary that serving survives: what the adapter connects to the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from reap_serve.record.captured import CapturedRecorder
from reap_serve.record.clock import Meter
from reap_serve.record.lockstep import LockstepRecorder
from reap_serve.record.moe_sum import MoeSumRecorder
from reap_serve.record.recorder import Moment, Recorder


class Boundary(Protocol):
    """What stands between a recorder and the request.

    Attributes:
        failures: How many there were.
        own: What observation has taken.
    """

    failures: int
    own: Meter

    @property
    def step_recorded(self) -> bool:
        """Whether a row of the current step is recorded."""

    @property
    def capturing(self) -> bool:
        """Whether a graph is being captured now."""

    def guarded(self, action: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Runs an action; what it raises ends the recording."""

    def fail(self, error: Exception) -> None:
        """Ends the recording."""


class Apparatus(Protocol):
    """What has to be in place while a recorded step runs, and only then."""

    def enter(self) -> None:
        """Such a step begins."""

    def leave(self) -> None:
        """It is over.

        Raises:
            RuntimeError: A layer was not seen in it.
        """


class Tap:
    """One layer's recorder, asked in recorded steps only.

    Attributes:
        recorder: The recorder.
    """

    def __init__(self, boundary: Boundary, recorder: Recorder) -> None:
        self.recorder = recorder
        self._boundary = boundary

    @property
    def moment(self) -> Moment:
        """When it has to see the layer's calls."""
        return self.recorder.moment

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor | None:
        """Sees the routed tokens; gives the layer's output if the recorder computed it. Never raises."""
        if not self._boundary.step_recorded:
            return None
        return self._boundary.guarded(lambda: self.recorder.record(x_TH, gate_TK, expert_ids_TK))


class SumTap(Tap):
    """One layer's `moe_sum` recorder.

    It acts whether or not the engine records: a graph that is captured now is replayed later. What counts is in the
    labels.
    """

    recorder: MoeSumRecorder

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Notes the call whose rows follow."""
        self.recorder.record(x_TH, gate_TK, expert_ids_TK)

    def rows_written(self, rows_TKH: torch.Tensor) -> None:
        """Sees the weighted rows that the kernel is about to add. Never raises."""
        capturing = self._boundary.capturing
        # A graph is replayed long after: whatever has failed before, it has to have all layers.
        if self._boundary.failures > 0 and not capturing:
            return
        if not capturing:
            self._boundary.own.start()
        try:
            self.recorder.rows_written(rows_TKH)
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self._boundary.fail(error)
        finally:
            if not capturing:
                self._boundary.own.stop()


class CapturedTap(Tap):
    """One layer's `deferred` recorder under graphs.

    It acts also while a graph is captured, for replays to come, and once before: a kernel's code is loaded when it is
    first called, which is no thing to do during a capture.
    """

    recorder: CapturedRecorder

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Sees the routed tokens. Never raises."""
        if self._boundary.step_recorded and not self._boundary.capturing:
            super().record(x_TH, gate_TK, expert_ids_TK)
        elif self._boundary.capturing or not self.recorder.loaded:
            try:
                self.recorder.gather(x_TH, gate_TK, expert_ids_TK)
            except Exception as error:  # noqa: BLE001 - the hook boundary
                self._boundary.fail(error)


class LockstepTap(Tap):
    """One layer's recorder that acts together with those of other ranks, in every forward pass of all of them."""

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Sees the routed tokens. Never raises."""
        self._boundary.own.start()
        try:
            self.recorder.record(x_TH, gate_TK, expert_ids_TK)
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self._boundary.fail(error)
        finally:
            self._boundary.own.stop()


def make_tap(boundary: Boundary, recorder: Recorder) -> Tap:
    """The tap of a recorder."""
    if isinstance(recorder, CapturedRecorder):
        return CapturedTap(boundary, recorder)
    if isinstance(recorder, LockstepRecorder):
        return LockstepTap(boundary, recorder)
    return (SumTap if isinstance(recorder, MoeSumRecorder) else Tap)(boundary, recorder)
