"""The hook boundary: what a recorder raises ends the recording, never a request."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_layer import FakeExperts, facts

from reap_serve.adapter import engine_view, seams
from reap_serve.record.observer import Observer
from reap_serve.record.settings import ObserveSettings

X_TH = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
IDS_TK = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)
GATE_TK = torch.tensor([[0.5, 0.25], [1.0, 0.125]])


class NoMasks:
    """No request is under a plan."""

    def admit(self, request_id: str, prompt_tokens: int, arguments: dict[str, object] | None) -> bool:
        return False


class BrokenExperts(FakeExperts):
    """Raises in the second call."""

    def forward(self, x_NH: torch.Tensor, weight_NK: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        if len(self.calls) == 1:
            raise RuntimeError("out of memory")
        return FakeExperts.forward(self, x_NH, weight_NK, ids_NK)


def observer(monkeypatch: pytest.MonkeyPatch, recorder: str, experts: FakeExperts) -> tuple[Observer, Any]:
    """An observer of one layer, and the layer."""
    layer = SimpleNamespace(routed_experts=SimpleNamespace(reap_tap=None))
    monkeypatch.setattr(engine_view, "layer_facts", lambda layer: facts(experts))
    monkeypatch.setattr(engine_view, "opaque_forward", lambda layer: None)
    settings = ObserveSettings(recorder=recorder, buffer_tokens=2, read_kernel_rows=False)
    masks: Any = NoMasks()
    return Observer(settings, [layer], torch.device("cpu"), 1, masks, max_rows=8), layer


def step(running: Observer, layer: Any, first: int, new: bool = False) -> torch.Tensor | None:
    """A step of two rows of the request `a`, whose prompt has six tokens."""
    request = SimpleNamespace(req_id="a", prompt_token_ids=[1] * 6, sampling_params=None)
    running.requests_change(SimpleNamespace(finished_req_ids=[], scheduled_new_reqs=[request] if new else []))
    running.rows_ordered(seams.BatchRows(["a"], [2], [first]))
    output = layer.routed_experts.reap_tap.observe(X_TH, GATE_TK, IDS_TK)
    running.step_ends(busy_seconds=0.01)
    return output


@pytest.mark.parametrize("recorder", ["inline", "deferred"])
def test_what_a_recorder_raises_stops_recording_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recorder: str
) -> None:
    running, layer = observer(monkeypatch, recorder, BrokenExperts())
    with caplog.at_level(logging.ERROR, "reap_serve"):
        step(running, layer, 0, new=True)
        assert running.recording
        outputs = [step(running, layer, 2), step(running, layer, 4)]
    # The layer computes its own output again.
    assert outputs == [None, None]
    assert (running.failures, running.recording) == (1, False)
    assert [record.message for record in caplog.records] == [
        "recording stopped, statistics are incomplete: RuntimeError: out of memory"
    ]
    taken = running.snapshot()
    assert not taken.window.complete
    assert taken.tokens_SPL[0, :, 0].tolist() == [2, 0]


def test_a_recorded_step_whose_kernels_were_not_seen_ends_the_recording(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unseen:
        entered = False

        def enter(self) -> None:
            self.entered = True

        def leave(self) -> None:
            self.entered = False
            raise RuntimeError("0 of 1 layers")

    running, layer = observer(monkeypatch, "deferred", FakeExperts())
    monkeypatch.setattr(running, "_kernel_taps", Unseen())
    with caplog.at_level(logging.ERROR, "reap_serve"):
        step(running, layer, 0, new=True)
        step(running, layer, 2)
    assert (running.failures, running.recording) == (1, False)
    assert not running.snapshot().window.complete
    assert len(caplog.records) == 1


def test_a_window_without_failures_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    running, layer = observer(monkeypatch, "deferred", FakeExperts())
    for first in (0, 2, 4):
        step(running, layer, first, new=first == 0)
    taken = running.snapshot()
    assert taken.window.complete
    assert taken.tokens_SPL[0, :, 0].tolist() == [6, 0]
    assert (taken.window.prompt_tokens_total, taken.window.prompt_tokens_computed) == (6, 6)
    assert taken.sums_SPLEC[0, 0, 0, :, 0].tolist() == [3, 3, 3, 3]


def test_rows_between_two_steps_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    running, layer = observer(monkeypatch, "inline", FakeExperts())
    step(running, layer, 0, new=True)
    assert layer.routed_experts.reap_tap.observe(X_TH, GATE_TK, IDS_TK) is None
    assert running.snapshot().tokens_SPL[0, :, 0].tolist() == [2, 0]


def test_nothing_is_recorded_before_start_and_after_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    running, layer = observer(monkeypatch, "deferred", FakeExperts())
    running.recording = False
    step(running, layer, 0, new=True)
    running.start()
    step(running, layer, 2)
    running.stop()
    step(running, layer, 4)
    assert running.snapshot().tokens_SPL[0, :, 0].tolist() == [2, 0]


def test_a_reset_starts_a_window_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    running, layer = observer(monkeypatch, "deferred", FakeExperts())
    step(running, layer, 0, new=True)
    before = running.snapshot()
    running.reset()
    after = running.snapshot()
    assert after.window.id != before.window.id
    assert after.tokens_SPL.sum() == 0
    assert after.window.prompt_tokens_total == 4
