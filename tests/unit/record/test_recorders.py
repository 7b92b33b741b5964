"""The recorders on a layer that multiplies by id + 1."""

from __future__ import annotations

import numpy as np
import torch
from fake_layer import FakeExperts, cells, facts

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.inline import InlineRecorder
from reap_serve.record.sampling import RowSampler

CPU = torch.device("cpu")
TRASH = 4
X_TH = torch.tensor([[3.0, -4.0], [0.0, 2.0], [1.0, 0.0]])
IDS_TK = torch.tensor([[1, 0], [3, 2], [1, 3]], dtype=torch.int32)
GATE_TK = torch.tensor([[0.5, 0.25], [1.0, 0.125], [0.5, 0.5]])
# (slot, expert): count, g, |f|, |f|^2, g|f|, (g|f|)^2
EXPECTED = {
    (0, 1): [1, 0.5, 10, 100, 5, 25],
    (0, 0): [1, 0.25, 5, 25, 1.25, 1.5625],
    (3, 3): [1, 1, 8, 64, 8, 64],
    (3, 2): [1, 0.125, 6, 36, 0.75, 0.5625],
}


def expected() -> list[list[list[float]]]:
    return [[EXPECTED.get((slot, expert), [0] * 6) for expert in range(4)] for slot in range(4)]


def state(fraction: float = 1.0) -> tuple[LayerSums, RowSampler]:
    return LayerSums(TRASH, 4, CPU), RowSampler(fraction, TRASH, CPU)


def test_inline_computes_the_output_and_the_sums_in_one_kernel_call() -> None:
    sums, sampler = state()
    experts = FakeExperts()
    sampler.begin(np.array([0, 3, TRASH]))
    output = InlineRecorder(facts(experts), sums, sampler).record(X_TH, GATE_TK, IDS_TK)
    assert output is not None
    torch.testing.assert_close(output, FakeExperts().forward(X_TH, GATE_TK, IDS_TK))
    assert experts.calls == [(6, 1)]
    assert cells(sums)[:TRASH].tolist() == expected()
    assert sums.tokens_S[:TRASH].tolist() == [1, 0, 0, 1]


def test_inline_leaves_dummy_runs_to_the_layer() -> None:
    sums, sampler = state()
    experts = FakeExperts()
    assert InlineRecorder(facts(experts), sums, sampler).record(X_TH, GATE_TK, IDS_TK) is None
    assert experts.calls == []


def test_deferred_measures_later_what_it_copied() -> None:
    sums, sampler = state()
    experts = FakeExperts()
    recorder = DeferredRecorder(facts(experts), sums, sampler, buffer_tokens=8)
    sampler.begin(np.array([0, 3, TRASH]))
    x_TH = X_TH.clone()
    assert recorder.record(x_TH, GATE_TK, IDS_TK) is None
    x_TH.zero_()  # vLLM reuses the memory
    assert experts.calls == []
    recorder.flush()
    assert experts.calls == [(4, 1)]
    assert cells(sums)[:TRASH].tolist() == expected()
    assert sums.tokens_S.tolist() == [1, 0, 0, 1, 0]
    recorder.flush()
    assert experts.calls == [(4, 1)]


def test_deferred_flushes_whenever_its_buffer_is_full() -> None:
    sums, sampler = state()
    experts = FakeExperts()
    recorder = DeferredRecorder(facts(experts), sums, sampler, buffer_tokens=2)
    for _ in range(3):
        sampler.begin(np.array([0, 0, 0]))
        recorder.record(X_TH, GATE_TK, IDS_TK)
    assert experts.calls == [(4, 1)] * 4
    recorder.flush()
    assert experts.calls == [(4, 1)] * 4 + [(2, 1)]
    assert sums.tokens_S.tolist() == [9, 0, 0, 0, 0]


def test_inline_keeps_a_weight_on_the_input_from_the_kernel() -> None:
    sums, sampler = state()
    experts = FakeExperts(overwrites_weights=True)
    sampler.begin(np.array([0, 0, TRASH]))
    gate_TK = GATE_TK[:, :1].clone()
    InlineRecorder(facts(experts, top_k=1, weight_on_input=True), sums, sampler).record(X_TH, gate_TK, IDS_TK[:, :1])
    assert gate_TK.tolist() == GATE_TK[:, :1].tolist()
    assert cells(sums)[0, 3].tolist() == [1, 1, 8, 64, 8, 64]


def test_deferred_gives_a_weight_on_the_input_to_the_kernel() -> None:
    sums, sampler = state()
    layer = facts(FakeExperts(overwrites_weights=True), top_k=1, weight_on_input=True)
    recorder = DeferredRecorder(layer, sums, sampler, buffer_tokens=8)
    sampler.begin(np.array([0, 0, TRASH]))
    recorder.record(X_TH, GATE_TK[:, :1], IDS_TK[:, :1])
    recorder.flush()
    # f(g x): 2 * 0.5 * 5 and 4 * 1 * 2; they count as plain and as weighted output.
    assert cells(sums)[0, 1].tolist() == [1, 0.5, 5, 25, 5, 25]
    assert cells(sums)[0, 3].tolist() == [1, 1, 8, 64, 8, 64]
