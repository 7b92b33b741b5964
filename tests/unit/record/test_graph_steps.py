"""Steps of an engine with graphs: what the recorder of steps does around replays."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from fake_layer import FakeExperts, facts
from graph_replay import capture, capturing, kernels_of

from reap_serve.errors import EngineError
from reap_serve.record import captured_rows
from reap_serve.record.captured_rows import CapturedRows, Graphs, room_for
from reap_serve.record.captured_steps import CapturedSteps
from reap_serve.record.clock import HostMeter
from reap_serve.record.pace import Pace
from reap_serve.record.recorder import RowShape
from reap_serve.record.requests import Requests
from reap_serve.record.sampling import RowSample, RowSampler
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums
from reap_serve.record.step import BatchRows
from reap_serve.record.step_recorder import StepRecorder

CPU = torch.device("cpu")
SHAPE = RowShape(2, 2, torch.float32)
SIZE = 8


class Engine:
    """One layer, captured at eight rows, and requests of which each step decodes one token."""

    def __init__(self, settings: ObserveSettings) -> None:
        self.requests = Requests(settings.max_slices)
        known = dataclasses.replace(facts(FakeExperts()), shape=SHAPE)
        self.recorder = StepRecorder(
            settings, [known], CPU, 1, self.requests, 64, Graphs(largest=SIZE, capturing=capturing)
        )
        (self.tap,) = self.recorder.taps
        self.x_TH = torch.zeros(SIZE, 2)
        self.gate_TK = torch.full((SIZE, 2), 0.5)
        self.ids_TK = torch.zeros(SIZE, 2, dtype=torch.int32)
        self.ids_TK[:, 1] = 3
        on_device = (self.x_TH, self.gate_TK, self.ids_TK, self.recorder._captured)
        loaded = kernels_of(self.layer)
        self.graph = capture(self.layer, on_device, loaded)
        self.position = 0

    def layer(self) -> None:
        """What a pass does in the layer."""
        self.tap.record(self.x_TH, self.gate_TK, self.ids_TK)

    def step(self, requests: int) -> None:
        """A step that replays the graph: row i of it has the norm i + 1 before its expert."""
        if self.position == 0:
            for number in range(requests):
                self.requests.add(str(number), 1, None)
        ids = [str(number) for number in range(requests)]
        self.recorder.busy.start()
        if self.recorder.recording:
            batch = BatchRows(ids, [1] * requests, [self.position] * requests)
            self.recorder.begin(self.requests.step(batch))
        self.x_TH[:, 0] = torch.arange(SIZE) + 1.0
        self.graph.replay()
        self.recorder.end()
        self.recorder.busy.stop()
        self.position += 1

    def snapshot(self) -> RankSums:
        return self.recorder.snapshot()


@pytest.mark.parametrize("recorder", ["auto", "deferred"])
def test_replayed_steps_are_recorded_whole(recorder: str) -> None:
    settings = ObserveSettings(recorder=recorder, extra_sums=("output_sum",), buffer_tokens=16)
    engine = Engine(settings)
    for _ in range(7):
        engine.step(3)
    taken = engine.snapshot()
    assert (taken.window.recorder, taken.window.complete) == ("deferred", True)
    # The first step reads the prompts, six more write answers.
    assert taken.tokens_SPL[0, :, 0].tolist() == [3, 18]
    sums_EC = taken.sums_SPLEC[0].sum(axis=0)[0]
    assert sums_EC[:, 0].tolist() == [21, 0, 0, 21]
    # Expert 0 multiplies by one, expert 3 by four; rows of norm 1, 2 and 3, seven times.
    assert sums_EC[:, 2].tolist() == [42, 0, 0, 168]
    assert sums_EC[:, 4].tolist() == [21, 0, 0, 84]


def test_nothing_is_recorded_after_stop_and_replays_go_on() -> None:
    engine = Engine(ObserveSettings(recorder="deferred"))
    engine.step(2)
    engine.recorder.stop()
    engine.step(2)
    assert engine.snapshot().tokens_SPL[0, :, 0].tolist() == [2, 0]


def test_what_a_graphs_step_fails_with_ends_the_recording() -> None:
    engine = Engine(ObserveSettings(recorder="deferred"))
    engine.recorder._captured.rows.landing_rows = 1  # type: ignore[union-attr]
    engine.step(2)
    assert (engine.recorder.failures, engine.recorder.recording) == (1, False)
    engine.step(2)
    taken = engine.snapshot()
    assert not taken.window.complete
    assert taken.tokens_SPL.sum() == 0


def test_a_fraction_is_sampled_without_bias_and_never_more_rows_than_land() -> None:
    """512 rows a step, of which 64 land: the budget's fraction is bounded by an eighth."""
    graphs = Graphs(largest=512, capturing=capturing)
    room, ceiling = room_for(graphs, [SHAPE], 1.0, bounded=True, held=1024, device=CPU)
    assert (room.landing_rows, ceiling) == (64, 0.125)
    room, ceiling = room_for(graphs, [SHAPE], 1.0, bounded=False, held=16, device=CPU)
    assert (room.landing_rows, room.held_rows, ceiling) == (512, 512, 1.0)
    room, ceiling = room_for(graphs, [SHAPE], 0.3, bounded=False, held=16, device=CPU)
    assert (room.landing_rows, ceiling) == (154, 0.3)

    for fraction, landing in ((0.125, 64), (0.3, 154), (1.0, 512)):
        sampler = RowSampler(fraction, 99, CPU)
        taken_T = np.zeros(512)
        for num_rows in (512, 300, 65, 64, 7) * 60:
            sampler.begin(np.zeros(num_rows, np.int64))
            if sampler.sample is not None:
                assert sampler.sample.host_rows.shape[0] <= landing
                taken_T[sampler.sample.host_rows] += 1
        assert sampler.sampled_tokens / sampler.real_tokens == pytest.approx(fraction, rel=0.2)
        # Row 0 is in every step, row 400 in a fifth of them.
        assert taken_T[:7].mean() / 300 == pytest.approx(fraction, rel=0.35)
        assert taken_T[400:].mean() / 60 == pytest.approx(fraction, rel=0.35)


def test_a_budget_begins_at_the_smallest_fraction_under_graphs_too() -> None:
    engine = Engine(ObserveSettings(overhead_budget=0.02))
    assert engine.recorder.sample_fraction == 0.01
    assert engine.recorder.held_bytes > 0


def test_a_warm_up_loads_what_graphs_capture() -> None:
    engine = Engine(ObserveSettings())
    assert engine.tap.recorder.loaded
    # Passes that are not recorded do nothing from then on.
    assert kernels_of(engine.layer) == set()


class Graph:
    """A CUDA graph that does nothing."""

    def replay(self) -> None:
        pass


def test_gathers_are_timed_outside_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of fifty were sampled, eight land: timed with that step's index a GPU would read behind the eighth."""
    monkeypatch.setattr(CapturedRows, "on_cuda", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(captured_rows, "StreamMeter", HostMeter)
    rows, own = CapturedRows(1, SHAPE, CPU, 8, 16), HostMeter()
    steps = CapturedSteps(rows, Graphs(largest=64, capturing=capturing), own)
    sampled = np.array([40, 41])
    steps.begin(RowSample(torch.from_numpy(sampled), torch.tensor([0, 1]), sampled), 50)
    assert own.seconds > 0.0
    assert rows._index_N[:2].tolist() == [40, 41]
    with pytest.raises(RuntimeError, match="a step has begun"):
        rows.gather_seconds()


def test_a_graph_that_lacks_a_layer_is_never_recorded_from(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(ObserveSettings())
    wide = torch.zeros(SIZE, 3)
    capture(lambda: engine.tap.record(wide, engine.gate_TK, engine.ids_TK), (engine.recorder._captured, wide))
    assert (engine.recorder.failures, engine.recorder.recording) == (1, False)
    engine.recorder.start()
    assert not engine.recorder.recording
    assert "a graph was captured without its recorder" in caplog.text


def test_what_failed_before_a_capture_is_in_the_graph_all_the_same() -> None:
    engine = Engine(ObserveSettings())
    engine.recorder.fail(ValueError("a step"))
    graph = capture(engine.layer, (engine.x_TH, engine.gate_TK, engine.ids_TK, engine.recorder._captured))
    assert len([name for name in graph.operators if "index_select" in name]) == 3


def test_nothing_of_a_step_that_the_engine_failed_in_counts() -> None:
    engine = Engine(ObserveSettings(recorder="deferred"))
    engine.step(2)
    batch = BatchRows(["0", "1"], [1, 1], [1, 1])
    engine.recorder.begin(engine.requests.step(batch))
    engine.recorder.step_failed()
    engine.recorder.end()
    taken = engine.snapshot()
    assert taken.tokens_SPL.sum() == 2
    assert not taken.window.complete


def test_a_budget_is_held_by_what_the_stream_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 ms of which recording takes 0.1: a share of 0.01, of which three tenths of 0.02 are wanted."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def query(self) -> bool:
            return True

        def elapsed_time(self, end_event: Event) -> float:
            return 1000 * (end_event.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = Pace(0.02, 1.0, 64, torch.device("cuda"), None)
    pace.fraction = pace._governor.fraction = 0.5  # type: ignore[union-attr]
    for step in range(101):
        pace.busy.start()
        pace.own.start()
        now[0] += 0.0001
        pace.own.stop()
        now[0] += 0.0099
        pace.busy.stop()
        pace.step_is_over(64 * step)
    assert pace.fraction == pytest.approx(0.3)
    assert (pace.own.seconds / pace.busy.seconds) == pytest.approx(0.01)


def test_layers_of_different_shapes_gather_in_no_graph_and_are_recorded_in_eager_steps() -> None:
    shapes = SHAPE, RowShape(3, 2, torch.float32)
    layers = [dataclasses.replace(facts(FakeExperts()), shape=shape) for shape in shapes]

    def start(graphs: Graphs | None) -> StepRecorder:
        return StepRecorder(ObserveSettings(), layers, CPU, 1, Requests(16), 64, graphs)

    with pytest.raises(
        EngineError, match=r"different shapes cannot gather rows inside CUDA graphs; add --enforce-eager"
    ):
        start(Graphs(largest=SIZE, capturing=capturing))
    assert start(None).recording
