"""Recorders under captured graphs, held against the eager oracle on the same rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from captured_passes import CPU, HIDDEN, LAYERS, SHAPE, SIZES, TRASH, Inputs, model, sums_of_layers
from fake_layer import FakeExperts, facts
from graph_replay import Graph, capture

from reap_serve.record.captured import CapturedRecorder, Measure
from reap_serve.record.captured_rows import CapturedRows, held_rows
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.inline import InlineRecorder
from reap_serve.record.recorder import RowShape
from reap_serve.record.sampling import RowSampler


class Captured:
    """Two layers whose passes are captured at every size, and their eager oracle."""

    def __init__(self, held: int = 16, call_rows: int = 6, landing: int = 8) -> None:
        self.inputs = Inputs.empty()
        self.sampler = RowSampler(1.0, TRASH, CPU)
        self.rows = CapturedRows(LAYERS, SHAPE, CPU, landing, held)
        self.sums, self.expected = sums_of_layers(), sums_of_layers()
        self.experts = FakeExperts()
        known = replace(facts(self.experts), call_rows=call_rows)
        self.recorders = [
            CapturedRecorder(layer, self.rows, self.sampler, Measure(known, sums, None))
            for layer, sums in enumerate(self.sums)
        ]
        self.oracle = [DeferredRecorder(facts(FakeExperts()), sums, self.sampler, 64) for sums in self.expected]
        self.graphs = {size: self.capture(size) for size in SIZES}

    def capture(self, size: int) -> Graph:
        return capture(lambda: model(self.inputs, self.recorders, size), (self.inputs, self.rows))

    def step(self, random: torch.Generator, slots: list[int], size: int, *, sampled: bool = True) -> None:
        """A step that replays the graph of a size."""
        self.inputs.fill(random, len(slots))
        if sampled:
            self.sampler.begin(np.array(slots))
            assert self.sampler._sample is not None
            rows = self.sampler._sample.rows.numpy()
            self.rows.begin(rows, self.sampler._sample.slots)
            with torch.inference_mode():
                model(self.inputs, self.oracle, len(slots))
        self.graphs[size].replay()
        assert torch.equal(self.graphs[size].output[: len(slots)], self.plain(len(slots)))
        self.rows.end()
        self.sampler.end()

    def plain(self, size: int) -> torch.Tensor:
        """What the model computes without a recorder."""

        class Nothing:
            def record(self, *arguments: torch.Tensor) -> None:
                return None

        return model(self.inputs, [Nothing(), Nothing()], size)

    def check(self) -> None:
        """The sums are the oracle's."""
        with torch.inference_mode():
            for recorder in (*self.recorders, *self.oracle):
                recorder.flush()
        for found, expected in zip(self.sums, self.expected, strict=True):
            assert found.tokens_S.tolist() == expected.tokens_S.tolist()
            assert torch.equal(found.sums_SEC[:TRASH, :, 0], expected.sums_SEC[:TRASH, :, 0])
            torch.testing.assert_close(found.sums_SEC[:TRASH], expected.sums_SEC[:TRASH])
            torch.testing.assert_close(found.maxima_SEC[:TRASH], expected.maxima_SEC[:TRASH])


def test_replayed_steps_are_measured_as_in_eager_mode() -> None:
    engine, random = Captured(), torch.Generator().manual_seed(0)
    for _ in range(12):
        # Slices change between replays, batches are smaller than the graph's, some steps are not sampled.
        engine.step(random, [0, 1, 3, 0, 2, 1], 8)
        engine.step(random, [2, TRASH], 4)
        engine.step(random, [1], 4, sampled=False)
        engine.step(random, [3, 3, 0, 1, 2, 2, 0, TRASH, TRASH], 16)
    engine.check()
    assert engine.sums[0].tokens_S[:TRASH].sum() == 12 * (6 + 1 + 7)
    # No call of the kernel is larger than what its workspace was made for.
    assert max(rows for rows, _ in engine.experts.calls if _ == 1) <= 6


def test_a_step_that_is_not_sampled_reads_within_its_rows() -> None:
    """After rows 4 to 7 of a step were sampled, a graph of four rows must not gather them: a GPU would stop."""
    engine, random = Captured(), torch.Generator().manual_seed(1)
    engine.step(random, [TRASH] * 4 + [0] * 4, 8)
    assert engine.rows._index_N.tolist() == [0] * 8
    engine.step(random, [1, 1], 4, sampled=False)
    engine.check()


def test_steps_in_python_and_replayed_ones_mix() -> None:
    engine, random = Captured(held=16), torch.Generator().manual_seed(2)
    for slots in ([0, 1, 2], [3] * 14, [1] * 16):
        engine.step(random, [0, 3], 4)
        engine.inputs.fill(random, len(slots))
        engine.sampler.begin(np.array(slots))
        assert engine.sampler._sample is not None
        engine.rows.begin(np.arange(len(slots)), engine.sampler._sample.slots)
        with torch.inference_mode():
            model(engine.inputs, engine.recorders, len(slots))
            model(engine.inputs, engine.oracle, len(slots))
        engine.rows.end()
    engine.check()


def test_more_rows_than_are_held_are_measured_as_they_come() -> None:
    engine, random = Captured(held=8), torch.Generator().manual_seed(3)
    engine.step(random, [0, 1], 4)
    engine.inputs.fill(random, 13)
    engine.sampler.begin(np.array([2] * 13))
    assert engine.sampler._sample is not None
    engine.rows.begin(np.arange(13), engine.sampler._sample.slots)
    with torch.inference_mode():
        model(engine.inputs, engine.recorders, 13)
        model(engine.inputs, engine.oracle, 13)
    engine.rows.end()
    assert engine.rows.held == 2
    engine.check()


def test_a_failed_step_leaves_nothing() -> None:
    engine, random = Captured(), torch.Generator().manual_seed(4)
    engine.inputs.fill(random, 3)
    engine.sampler.begin(np.array([0, 1, 2]))
    assert engine.sampler._sample is not None
    engine.rows.begin(np.arange(3), engine.sampler._sample.slots)
    engine.rows.discard()
    engine.rows.end()
    assert engine.rows.held == 0
    assert engine.rows._index_N.tolist() == [0] * 8


def test_a_step_of_which_python_sees_a_part_is_an_error() -> None:
    engine = Captured()
    engine.rows.begin(np.arange(2), torch.tensor([0, 1]))
    assert engine.rows.takes(2)
    with pytest.raises(RuntimeError, match="1 of 2 layers of a step ran in Python"):
        engine.rows.end()


def test_more_sampled_rows_than_land_are_an_error() -> None:
    engine = Captured()
    engine.rows.begin(np.arange(9), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="9 sampled rows, 8 land"):
        engine.rows.end()


def test_rows_of_another_width_are_refused_while_capturing() -> None:
    engine = Captured()
    wide = torch.zeros(4, HIDDEN + 1)
    with pytest.raises(ValueError, match=r"rows of \(4,\), there is room for \(3,\)"):
        engine.rows.gather(0, wide, engine.inputs.gate_LTK[0, :4], engine.inputs.ids_LTK[0, :4])


def test_other_dtypes_land_too() -> None:
    engine = Captured()
    engine.rows.begin(np.array([1]), torch.tensor([0]))
    gate, ids = torch.tensor([[0.5, 0.25], [1.0, 0.5]], dtype=torch.bfloat16), torch.tensor([[0, 1], [2, 3]])
    engine.rows.gather(0, torch.ones(2, HIDDEN), gate, ids)
    engine.rows.end()
    found = engine.rows.unmeasured(0)
    assert found is not None
    assert (found[1].tolist(), found[2].tolist()) == ([[1.0, 0.5]], [[2, 3]])


def test_memory_is_as_stated() -> None:
    """61 layers of hidden 7,168 in bfloat16, top-8: the module's docstring."""
    shape = RowShape(7168, 8, torch.bfloat16)
    assert held_rows(1024, 64, 61, shape) == 305
    assert 61 * (64 + 256) * shape.row_bytes == 281_088_000
    rows = CapturedRows(2, SHAPE, CPU, 8, 16)
    assert rows.num_bytes == 2 * (8 + 16) * SHAPE.row_bytes + 8 * 16 + 8 * 8


def test_recorders_in_python_record_nothing_in_a_graph() -> None:
    """Why they are refused there: captured outside of a step they leave no operator behind."""
    inputs = Inputs.empty()
    sampler = RowSampler(1.0, TRASH, CPU)
    for kind in (InlineRecorder, lambda *each: DeferredRecorder(*each, 64)):
        recorders = [kind(facts(FakeExperts()), sums, sampler) for sums in sums_of_layers()]
        graph = capture(lambda recorders=recorders: model(inputs, recorders, 4), inputs)
        assert not any("index" in name for name in graph.operators)
