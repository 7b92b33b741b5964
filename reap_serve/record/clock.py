"""How long steps take and what observation takes of them: by the host's clock, or by events on a stream.

A launch on an accelerator returns before the work is done. Two events in the stream tell the time between them as the
stream sees it: the kernels' own where the host is ahead, the host's where the stream waits for it. They are read when
they have passed, and never waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

import torch


class Event(Protocol):
    """A point in a stream."""

    def record(self) -> None:
        """It is now."""

    def query(self) -> bool:
        """Whether the stream has passed it."""

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from here to there."""


class Meter(Protocol):
    """Adds up durations."""

    @property
    def seconds(self) -> float:
        """Of all spans that are over."""

    def start(self) -> None:
        """A span begins; one inside another is part of it."""

    def stop(self) -> None:
        """It is over."""

    def add(self, seconds: float) -> None:
        """Adds a duration that was measured elsewhere."""


class HostMeter:
    """By the host's clock: on a CPU, where a call returns when its work is done."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started = 0.0
        self._depth = 0

    @property
    def seconds(self) -> float:
        """See `Meter`."""
        return self._seconds

    def start(self) -> None:
        """See `Meter`."""
        self._depth += 1
        if self._depth == 1:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """See `Meter`."""
        self._depth -= 1
        if self._depth == 0:
            self._seconds += time.perf_counter() - self._started

    def add(self, seconds: float) -> None:
        """See `Meter`."""
        self._seconds += seconds


class StreamMeter:
    """By events on a stream.

    Args:
        new_event: Makes an event that tells the time; by default one of the present CUDA stream.
    """

    def __init__(self, new_event: Callable[[], Event] | None = None) -> None:
        self._new_event = new_event or _cuda_event
        self._added = 0.0
        self._free: list[Event] = []
        self._started: list[Event | None] = []
        self._passing: deque[tuple[Event, Event]] = deque()

    def start(self) -> None:
        """See `Meter`."""
        self._started.append(None if self._started else self._event())

    def stop(self) -> None:
        """See `Meter`."""
        started = self._started.pop()
        if started is not None:
            self._passing.append((started, self._event()))
            self._collect()

    def add(self, seconds: float) -> None:
        """See `Meter`."""
        self._added += seconds

    @property
    def seconds(self) -> float:
        """Of the spans that the stream has passed."""
        self._collect()
        return self._added

    def _event(self) -> Event:
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    def _collect(self) -> None:
        while self._passing and self._passing[0][1].query():
            started, ended = self._passing.popleft()
            self._added += started.elapsed_time(ended) / 1000
            self._free += (started, ended)


def meter_of(device: torch.device) -> Meter:
    """What measures on a device."""
    return StreamMeter() if device.type == "cuda" else HostMeter()


def _cuda_event() -> Event:
    return cast(Event, torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
