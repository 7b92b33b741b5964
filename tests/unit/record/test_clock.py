"""Durations by the host's clock and by a stream's events, on a stream that is played by hand."""

from __future__ import annotations

import pytest
import torch

from reap_serve.record import clock
from reap_serve.record.clock import HostMeter, StreamMeter, meter_of


class Stream:
    """Events are appended to it; what was appended passes when told."""

    def __init__(self) -> None:
        self.appended: list[FakeEvent] = []

    def passes(self, *milliseconds: float) -> None:
        """The next events pass at these times."""
        for at, event in zip(milliseconds, self.appended, strict=False):
            event.at = at
        del self.appended[: len(milliseconds)]


class FakeEvent:
    stream: Stream

    def __init__(self) -> None:
        self.at: float | None = None

    def record(self) -> None:
        self.at = None
        self.stream.appended.append(self)

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self.at is not None
        assert end_event.at is not None
        return end_event.at - self.at


def test_a_span_counts_when_the_stream_has_passed_it() -> None:
    FakeEvent.stream = stream = Stream()
    meter = StreamMeter(FakeEvent)
    for _ in range(2):
        meter.start()
        meter.stop()
    assert meter.seconds == 0.0
    stream.passes(10.0, 12.0, 50.0)
    assert meter.seconds == 0.002
    stream.passes(55.0)
    meter.add(1.0)
    assert meter.seconds == 1.007


def test_events_are_used_again() -> None:
    FakeEvent.stream = stream = Stream()
    made = []

    class Counted(FakeEvent):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    meter = StreamMeter(Counted)
    for _ in range(5):
        meter.start()
        meter.stop()
        stream.passes(0.0, 1.0)
        assert meter.seconds > 0.0
    assert len(made) == 2


def test_the_hosts_clock() -> None:
    meter = HostMeter()
    times = iter([1.0, 1.5])
    perf_counter, clock.time.perf_counter = clock.time.perf_counter, lambda: next(times)
    try:
        meter.start()
        meter.stop()
    finally:
        clock.time.perf_counter = perf_counter
    meter.add(0.25)
    assert meter.seconds == 0.75


def test_a_span_inside_another_is_part_of_it() -> None:
    FakeEvent.stream = stream = Stream()
    meter = StreamMeter(FakeEvent)
    meter.start()
    meter.start()
    meter.stop()
    meter.stop()
    stream.passes(0.0, 3.0)
    assert meter.seconds == 0.003


def test_a_gpu_is_measured_by_timed_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host launches for a second what the stream does in three milliseconds."""
    FakeEvent.stream = stream = Stream()

    class CudaEvent(FakeEvent):
        def __init__(self, enable_timing: bool = False) -> None:
            super().__init__()
            assert enable_timing

    monkeypatch.setattr(torch.cuda, "Event", CudaEvent)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 1.0)
    meter = meter_of(torch.device("cuda"))
    meter.start()
    meter.stop()
    # Nothing waits for the stream: what it has not passed is counted later.
    assert meter.seconds == 0.0
    stream.passes(7.0, 10.0)
    assert meter.seconds == 0.003


def test_a_cpu_is_measured_by_the_host() -> None:
    assert isinstance(meter_of(torch.device("cpu")), HostMeter)
    assert isinstance(meter_of(torch.device("cuda")), StreamMeter)
