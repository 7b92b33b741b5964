"""The recorder inside `moe_sum` under captured graphs, held against the eager oracle on the same rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from captured_passes import CPU, LAYERS, SIZES, TRASH, Inputs, model, sums_of_layers
from fake_layer import FakeExperts, facts
from graph_replay import capture

from reap_serve.adapter.wiring import tap_reduction
from reap_serve.record.accumulate import LayerSums
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.moe_sum import MoeSumRecorder, PersistentSlots
from reap_serve.record.sampling import RowSampler


def moe_sum_layers() -> tuple[list[LayerSums], PersistentSlots, Callable[[Inputs, int], torch.Tensor]]:
    """Two layers of a kernel that writes weighted rows and adds them, with the `moe_sum` recorder."""
    sums, labels = sums_of_layers(), PersistentSlots(1.0, TRASH, CPU, max_rows=SIZES[-1])

    class Kernel:
        def apply(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
            rows_TKH = x_TH.unsqueeze(1) * (gate_TK * (ids_TK + 1)).unsqueeze(-1)
            output_TH = torch.empty_like(x_TH)
            self.moe_sum(rows_TKH, output_TH)
            return output_TH

        def moe_sum(self, input: torch.Tensor, output: torch.Tensor) -> None:
            torch.sum(input, dim=1, out=output)

    kernels = [Kernel() for _ in range(LAYERS)]
    recorders = [MoeSumRecorder(facts(FakeExperts()), each, labels) for each in sums]
    for kernel, recorder in zip(kernels, recorders, strict=True):
        tap_reduction(kernel, recorder.rows_written)

    def run(inputs: Inputs, size: int) -> torch.Tensor:
        x_TH = inputs.x_TH[:size]
        for layer, (kernel, recorder) in enumerate(zip(kernels, recorders, strict=True)):
            gate_TK, ids_TK = inputs.gate_LTK[layer, :size], inputs.ids_LTK[layer, :size]
            recorder.record(x_TH, gate_TK, ids_TK)
            x_TH = x_TH + kernel.apply(x_TH, gate_TK, ids_TK)
        return x_TH

    return sums, labels, run


def test_moe_sum_replays_as_in_eager_mode() -> None:
    sums, labels, run = moe_sum_layers()
    inputs, random = Inputs.empty(), torch.Generator().manual_seed(5)
    graphs = {size: capture(lambda size=size: run(inputs, size), (inputs, sums, labels)) for size in SIZES}
    expected, sampler = sums_of_layers(), RowSampler(1.0, TRASH, CPU)
    oracle = [DeferredRecorder(facts(FakeExperts()), each, sampler, 64) for each in expected]
    for each in sums:
        each.reset()
    for slots, size in [([0, 1, 3, TRASH, 2], 8), ([2], 4), ([1, 3, 3], 4), ([0] * 9, 16)] * 3:
        inputs.fill(random, len(slots))
        for each in (labels, sampler):
            each.begin(np.array(slots))
        graphs[size].replay()
        with torch.inference_mode():
            model(inputs, oracle, len(slots))
        for each in (labels, sampler):
            each.end()
        graphs[size].replay()  # a dummy run
    with torch.inference_mode():
        for recorder in oracle:
            recorder.flush()
    for found, wanted in zip(sums, expected, strict=True):
        assert found.tokens_S[:TRASH].tolist() == wanted.tokens_S[:TRASH].tolist()
        torch.testing.assert_close(found.sums_SEC[:TRASH], wanted.sums_SEC[:TRASH], rtol=1e-6, atol=0)
