"""The `moe_sum` recorder on fakes of the seam: a kernel that writes weighted rows and then adds them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_layer import FakeExperts, cells, facts

from reap_serve.adapter.wiring import tap_reduction
from reap_serve.record.accumulate import LayerSums
from reap_serve.record.moe_sum import MoeSumRecorder, PersistentSlots

CPU = torch.device("cpu")
TRASH = 4
X_TH = torch.tensor([[3.0, -4.0], [0.0, 2.0], [1.0, 0.0]])
IDS_TK = torch.tensor([[1, 0], [3, 2], [1, 3]], dtype=torch.int32)
GATE_TK = torch.tensor([[0.5, 0.25], [1.0, 0.125], [0.5, 0.5]])


class FakeTriton:
    """Writes the rows of its own experts, leaves NaN in the others, and adds the former."""

    def apply(
        self, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor, map_E: torch.Tensor
    ) -> torch.Tensor:
        rows_TKH = x_TH.unsqueeze(1) * (gate_TK * (ids_TK + 1)).unsqueeze(-1)
        rows_TKH[map_E[ids_TK.long()] < 0] = torch.nan
        output_TH = torch.empty_like(x_TH)
        self.moe_sum(rows_TKH, output_TH, ids_TK, map_E)
        return output_TH

    def moe_sum(self, input: torch.Tensor, output: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor) -> None:
        output.copy_(input.nan_to_num().sum(dim=1))


def run(map_E: torch.Tensor, slots: list[int], rows: int = 3) -> tuple[LayerSums, torch.Tensor, torch.Tensor]:
    sums, labels = LayerSums(TRASH, 4, CPU), PersistentSlots(1.0, TRASH, CPU, max_rows=8)
    recorder = MoeSumRecorder(facts(FakeExperts(), expert_map_E=map_E), sums, labels)
    kernel = FakeTriton()
    plain = kernel.apply(X_TH[:rows], GATE_TK[:rows], IDS_TK[:rows], map_E)
    tap_reduction(kernel, recorder.rows_written)
    labels.begin(np.array(slots))
    recorder.record(X_TH[:rows], GATE_TK[:rows], IDS_TK[:rows])
    return sums, plain, kernel.apply(X_TH[:rows], GATE_TK[:rows], IDS_TK[:rows], map_E)


def test_rows_are_measured_and_the_output_is_the_plain_one() -> None:
    sums, plain, output = run(torch.tensor([0, 1, 2, 3]), [0, 3, TRASH])
    assert torch.equal(output, plain)
    assert cells(sums)[0].tolist() == [[1, 0.25, 5, 25, 1.25, 1.5625], [1, 0.5, 10, 100, 5, 25], [0] * 6, [0] * 6]
    assert cells(sums)[3].tolist() == [[0] * 6, [0] * 6, [1, 0.125, 6, 36, 0.75, 0.5625], [1, 1, 8, 64, 8, 64]]
    assert sums.tokens_S.tolist() == [1, 0, 0, 1, 1]


def test_rows_of_other_ranks_leave_no_trace() -> None:
    sums, plain, output = run(torch.tensor([-1, 0, -1, 1]), [0, 3, TRASH])
    assert torch.equal(output, plain)
    assert not sums.sums_SEC.isnan().any()
    assert not sums.maxima_SEC.isnan().any()
    assert cells(sums)[0].tolist() == [[0] * 6, [1, 0.5, 10, 100, 5, 25], [0] * 6, [0] * 6]
    assert cells(sums)[3].tolist() == [[0] * 6, [0] * 6, [0] * 6, [1, 1, 8, 64, 8, 64]]


def test_padding_rows_of_a_graph_are_trash() -> None:
    sums, _, _ = run(torch.tensor([0, 1, 2, 3]), [0])
    assert sums.tokens_S.tolist() == [1, 0, 0, 0, 2]


def test_labels_stay_in_place_and_are_trash_outside_of_a_step() -> None:
    labels = PersistentSlots(1.0, TRASH, CPU, max_rows=4)
    captured = labels.all_slots(3)
    assert captured.tolist() == [TRASH] * 3
    labels.begin(np.array([2, 1]))
    assert captured.tolist() == [2, 1, TRASH]
    labels.begin(np.array([3]))
    assert captured.tolist() == [3, TRASH, TRASH]
    labels.end()
    assert captured.tolist() == [TRASH] * 3
    assert (labels.real_tokens, labels.sampled_tokens) == (3, 3)
    with pytest.raises(ValueError, match="a layer saw 5 rows, 4 were expected"):
        labels.all_slots(5)


def test_a_graph_that_is_replayed_adds_again() -> None:
    """What a CUDA graph repeats is the tensor operations: the same ones, recorded once, run on new labels and rows."""
    sums, labels = LayerSums(TRASH, 4, CPU), PersistentSlots(1.0, TRASH, CPU, max_rows=4)
    recorder = MoeSumRecorder(facts(FakeExperts()), sums, labels)

    def step(rows_TKH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        recorder.record(rows_TKH[:, 0], gate_TK, ids_TK)
        recorder.rows_written(rows_TKH)
        return rows_TKH

    rows_TKH = X_TH.unsqueeze(1) * (GATE_TK * (IDS_TK + 1)).unsqueeze(-1)
    graph = torch.fx.experimental.proxy_tensor.make_fx(step)(rows_TKH, GATE_TK, IDS_TK)
    sums.reset()
    for slots in ([0, 0, 0], [1, TRASH, 3]):
        labels.begin(np.array(slots))
        graph(rows_TKH, GATE_TK, IDS_TK)
        labels.end()
    assert sums.tokens_S.tolist() == [3, 1, 0, 1, 1]


def test_rows_of_another_shape_are_refused() -> None:
    sums, labels = LayerSums(TRASH, 4, CPU), PersistentSlots(1.0, TRASH, CPU, max_rows=4)
    recorder = MoeSumRecorder(facts(FakeExperts()), sums, labels)
    with pytest.raises(ValueError, match="for slots of shape None"):
        recorder.rows_written(torch.ones(3, 2, 2))
    recorder.record(X_TH, GATE_TK, IDS_TK)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\) for slots of shape \(3, 2\)"):
        recorder.rows_written(torch.ones(2, 2, 2))
