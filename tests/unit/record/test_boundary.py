"""The hook boundary: what a recorder raises ends the recording, never a request."""

from __future__ import annotations

import logging

import pytest
import torch
from fake_layer import FakeExperts, facts

from reap_serve.record.requests import Requests
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.step import BatchRows
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.record.tap import Tap

X_TH = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
IDS_TK = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)
GATE_TK = torch.tensor([[0.5, 0.25], [1.0, 0.125]])


class BrokenExperts(FakeExperts):
    """Raises in the second call."""

    def forward(self, x_NH: torch.Tensor, weight_NK: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        if len(self.calls) == 1:
            raise RuntimeError("out of memory")
        return FakeExperts.forward(self, x_NH, weight_NK, ids_NK)


def one_layer(recorder: str, experts: FakeExperts) -> tuple[StepRecorder, Tap]:
    """A recorder of one layer, and what the layer calls."""
    settings = ObserveSettings(recorder=recorder, buffer_tokens=2)
    requests = Requests(settings.max_slices)
    running = StepRecorder(settings, [facts(experts)], torch.device("cpu"), 1, requests, max_rows=8)
    return running, running.taps[0]


def step(running: StepRecorder, tap: Tap, first: int, new: bool = False) -> torch.Tensor | None:
    """A step of two rows of the request `a`, whose prompt has six tokens."""
    if new:
        running._requests.add("a", 6, None)
    if running.recording:
        running.begin(running._requests.step(BatchRows(["a"], [2], [first])))
    output = tap.record(X_TH, GATE_TK, IDS_TK)
    running.end()
    return output


@pytest.mark.parametrize("recorder", ["inline", "deferred"])
def test_what_a_recorder_raises_stops_recording_and_is_told_once(
    caplog: pytest.LogCaptureFixture, recorder: str
) -> None:
    running, tap = one_layer(recorder, BrokenExperts())
    with caplog.at_level(logging.ERROR, "reap_serve"):
        step(running, tap, 0, new=True)
        assert running.recording
        outputs = [step(running, tap, 2), step(running, tap, 4)]
    # The layer computes its own output again.
    assert outputs == [None, None]
    assert (running.failures, running.recording) == (1, False)
    assert [record.message for record in caplog.records] == [
        "recording stopped, statistics are incomplete: RuntimeError: out of memory"
    ]
    taken = running.snapshot()
    assert not taken.window.complete
    assert taken.tokens_SPL[0, :, 0].tolist() == [2, 0]


def test_a_recorded_step_whose_kernels_were_not_seen_ends_the_recording(caplog: pytest.LogCaptureFixture) -> None:
    class Unseen:
        def enter(self) -> None: ...

        def leave(self) -> None:
            raise RuntimeError("0 of 1 layers")

    running, tap = one_layer("deferred", FakeExperts())
    running.apparatus = Unseen()
    with caplog.at_level(logging.ERROR, "reap_serve"):
        step(running, tap, 0, new=True)
        step(running, tap, 2)
    assert (running.failures, running.recording) == (1, False)
    assert not running.snapshot().window.complete
    assert len(caplog.records) == 1


def test_a_window_without_failures_is_complete() -> None:
    running, tap = one_layer("deferred", FakeExperts())
    for first in (0, 2, 4):
        step(running, tap, first, new=first == 0)
    taken = running.snapshot()
    assert taken.window.complete
    assert taken.tokens_SPL[0, :, 0].tolist() == [6, 0]
    assert (taken.window.prompt_tokens_total, taken.window.prompt_tokens_computed) == (6, 6)
    assert taken.sums_SPLEC[0, 0, 0, :, 0].tolist() == [3, 3, 3, 3]


def test_rows_between_two_steps_do_not_count() -> None:
    running, tap = one_layer("inline", FakeExperts())
    step(running, tap, 0, new=True)
    assert tap.record(X_TH, GATE_TK, IDS_TK) is None
    assert running.snapshot().tokens_SPL[0, :, 0].tolist() == [2, 0]


def test_nothing_is_recorded_before_start_and_after_stop() -> None:
    running, tap = one_layer("deferred", FakeExperts())
    running.recording = False
    step(running, tap, 0, new=True)
    running.start()
    step(running, tap, 2)
    running.stop()
    step(running, tap, 4)
    assert running.snapshot().tokens_SPL[0, :, 0].tolist() == [2, 0]


def test_a_reset_starts_a_window_of_nothing() -> None:
    running, tap = one_layer("deferred", FakeExperts())
    step(running, tap, 0, new=True)
    before = running.snapshot()
    running.reset()
    after = running.snapshot()
    assert after.window.id != before.window.id
    assert after.tokens_SPL.sum() == 0
    assert after.window.prompt_tokens_total == 4
