"""Sums of a layer, worked by hand."""

from __future__ import annotations

import torch
from fake_layer import cells, largest

from reap_serve.record.accumulate import LayerSums, RowMeasures


def measures(gate: list[list[float]], norm: list[list[float]], largest: list[list[float]]) -> RowMeasures:
    gate_TK, norm_TK = torch.tensor(gate), torch.tensor(norm)
    return RowMeasures(gate_TK, norm_TK, gate_TK * norm_TK, torch.tensor(largest))


def test_rows_go_to_their_slot_and_expert() -> None:
    sums = LayerSums(num_slots=2, num_experts=3, device=torch.device("cpu"))
    rows = measures([[0.5, 0.25], [1.0, 0.5]], [[2.0, 4.0], [3.0, 1.0]], [[1.0, 2.0], [2.5, 0.5]])
    sums.add(torch.tensor([0, 1]), torch.tensor([[0, 2], [2, 0]]), rows)
    sums.add(torch.tensor([0, 1]), torch.tensor([[0, 2], [2, 0]]), rows)
    # count, g, |f|, |f|^2, g|f|, (g|f|)^2 of each of two additions
    assert cells(sums)[0].tolist() == [[2, 1, 4, 8, 2, 2], [0] * 6, [2, 0.5, 8, 32, 2, 2]]
    assert cells(sums)[1].tolist() == [[2, 1, 2, 2, 1, 0.5], [0] * 6, [2, 2, 6, 18, 6, 18]]
    assert largest(sums)[0].tolist() == [[2, 1], [0, 0], [4, 2]]
    assert largest(sums)[1].tolist() == [[1, 0.5], [0, 0], [3, 2.5]]
    assert sums.tokens_S.tolist() == [2, 2, 0]


def test_padded_ids_and_the_trash_slot_touch_no_real_sum() -> None:
    sums = LayerSums(num_slots=1, num_experts=2, device=torch.device("cpu"))
    rows = measures([[1.0, 1.0], [1.0, 1.0]], [[1.0, 7.0], [9.0, 9.0]], [[1.0, 7.0], [9.0, 9.0]])
    sums.add(torch.tensor([0, 1]), torch.tensor([[1, -1], [0, 1]]), rows)
    assert cells(sums)[0].tolist() == [[0] * 6, [1] * 6]
    assert largest(sums)[0].tolist() == [[0, 0], [1, 1]]
    assert sums.tokens_S.tolist() == [1, 1]


def test_small_terms_are_not_lost_beside_a_large_sum() -> None:
    sums = LayerSums(num_slots=1, num_experts=1, device=torch.device("cpu"))
    big, small = measures([[1.0]], [[2.0**26]], [[1.0]]), measures([[1.0]], [[1.0]], [[1.0]])
    sums.add(torch.tensor([0]), torch.tensor([[0]]), big)
    for _ in range(8):
        sums.add(torch.tensor([0]), torch.tensor([[0]]), small)
    assert sums.sums_SEC[0, 0, 2].item() == 2.0**26 + 8


def test_a_reset_keeps_the_memory() -> None:
    sums = LayerSums(num_slots=1, num_experts=1, device=torch.device("cpu"))
    place = sums.sums_SEC.data_ptr()
    sums.add(torch.tensor([0]), torch.tensor([[0]]), measures([[1.0]], [[1.0]], [[1.0]]))
    sums.reset()
    assert sums.sums_SEC.data_ptr() == place
    assert not sums.sums_SEC.any()
    assert not sums.maxima_SEC.any()
    assert not sums.tokens_S.any()
