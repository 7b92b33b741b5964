"""The steps of an engine whose graphs gather rows."""

from __future__ import annotations

import logging

import torch

from reap_serve.record.captured_rows import CapturedRows, Graphs
from reap_serve.record.clock import Meter
from reap_serve.record.sampling import RowSample

logger = logging.getLogger("reap_serve")


class CapturedSteps:
    """Tells the rows of each step to the graphs, and takes what they gathered.

    Args:
        rows: Room for them.
        graphs: Of the engine.
        own: What recording costs; what the graphs do for it is added.
    """

    def __init__(self, rows: CapturedRows, graphs: Graphs, own: Meter) -> None:
        self.rows = rows
        self._graphs = graphs
        self._own = own
        self._gather_seconds: float | None = None

    def begin(self, sample: RowSample | None, num_rows: int) -> None:
        """A step begins.

        Args:
            sample: Its sampled rows, None when there are none.
            num_rows: All of its rows.
        """
        with torch.inference_mode():
            if self._gather_seconds is None:
                self._gather_seconds = self._time_gathers()
            if sample is not None:
                self.rows.begin(sample.host_rows, sample.slots)
        if num_rows <= self._graphs.largest:
            self._own.add(self._gather_seconds)

    def end(self) -> None:
        """The step is over; see `CapturedRows.end`."""
        with torch.inference_mode():
            self.rows.end()

    def discard(self) -> None:
        """The step failed."""
        with torch.inference_mode():
            self.rows.discard()

    def _time_gathers(self) -> float:
        """What the graphs, which are there when the first step begins, spend on recording in a step."""
        try:
            return self.rows.gather_seconds() if self.rows.on_cuda else 0.0
        except Exception as error:  # noqa: BLE001 - recording is right without the figure
            logger.warning("what graphs do for recording is not counted: %s: %s", type(error).__name__, error)
            return 0.0
