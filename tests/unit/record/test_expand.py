"""Rows of an unfused layer and what is measured of them, worked by hand on experts that multiply by id + 1."""

from __future__ import annotations

import dataclasses

import torch
from fake_layer import FakeExperts, facts

from reap_serve.record.expand import expert_rows, local_ids, measure_rows

X_TH = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
IDS_TK = torch.tensor([[1, 0], [3, 2]])
GATE_TK = torch.tensor([[0.5, 0.25], [1.0, 0.125]])


def test_one_kernel_call_gives_one_row_a_routed_slot() -> None:
    experts = FakeExperts()
    rows_TKH = expert_rows(facts(experts), X_TH, torch.ones(2, 2), IDS_TK)
    assert experts.calls == [(4, 1)]
    assert rows_TKH.tolist() == [[[6, -8], [3, -4]], [[0, 8], [0, 6]]]


def test_plain_rows_give_norms_and_their_weighted_norms() -> None:
    layer = facts(FakeExperts(), gate_scale=2.0)
    rows_TKH = expert_rows(layer, X_TH, torch.ones(2, 2), IDS_TK)
    measured = measure_rows(layer, rows_TKH, GATE_TK, weighted=False)
    assert measured.gate_TK.tolist() == [[1.0, 0.5], [2.0, 0.25]]
    assert measured.norm_TK.tolist() == [[10, 5], [8, 6]]
    assert measured.weighted_norm_TK.tolist() == [[10, 2.5], [16, 1.5]]
    assert measured.activation_TK.tolist() == [[8, 4], [8, 6]]


def test_weighted_rows_give_the_same() -> None:
    layer = facts(FakeExperts(), gate_scale=2.0)
    plain = measure_rows(layer, expert_rows(layer, X_TH, torch.ones(2, 2), IDS_TK), GATE_TK, weighted=False)
    weighted = measure_rows(layer, expert_rows(layer, X_TH, GATE_TK, IDS_TK), GATE_TK, weighted=True)
    for name in ("gate_TK", "norm_TK", "weighted_norm_TK", "activation_TK"):
        torch.testing.assert_close(getattr(weighted, name), getattr(plain, name), rtol=1e-6, atol=0)


def test_a_gate_of_zero_counts_a_norm_of_zero() -> None:
    layer = facts(FakeExperts(), top_k=1)
    gate_TK = torch.tensor([[0.0], [0.5]])
    rows_TKH = expert_rows(layer, X_TH, gate_TK, IDS_TK[:, :1])
    measured = measure_rows(layer, rows_TKH, gate_TK, weighted=True)
    assert measured.norm_TK.tolist() == [[0], [8]]
    assert measured.weighted_norm_TK.tolist() == [[0], [4]]
    assert measured.activation_TK.tolist() == [[0], [8]]


def test_a_negative_gate_has_a_norm_all_the_same() -> None:
    layer = facts(FakeExperts(), top_k=1)
    gate_TK = torch.tensor([[-0.5], [0.5]])
    rows_TKH = expert_rows(layer, X_TH, gate_TK, IDS_TK[:, :1])
    measured = measure_rows(layer, rows_TKH, gate_TK, weighted=True)
    assert measured.gate_TK.tolist() == [[-0.5], [0.5]]
    assert measured.norm_TK.tolist() == [[10], [8]]
    assert measured.weighted_norm_TK.tolist() == [[5], [4]]


def test_a_weight_on_the_input_makes_the_row_what_the_model_adds() -> None:
    layer = facts(FakeExperts(), top_k=1, weight_on_input=True, gate_scale=2.0)
    gate_TK = torch.tensor([[0.5], [0.25]])
    rows_TKH = expert_rows(layer, X_TH, gate_TK, IDS_TK[:, :1])
    measured = measure_rows(layer, rows_TKH, gate_TK, weighted=True)
    assert measured.gate_TK.tolist() == [[1.0], [0.5]]
    assert measured.norm_TK.tolist() == [[5], [2]]
    assert measured.weighted_norm_TK.tolist() == [[10], [4]]


def test_partial_rows_are_added_up_before_the_norm() -> None:
    layer = facts(FakeExperts(), top_k=1, complete_rows=lambda rows: rows * 2)
    rows_TKH = expert_rows(layer, X_TH, torch.ones(2, 1), IDS_TK[:, :1])
    assert measure_rows(layer, rows_TKH, GATE_TK[:, :1], weighted=False).norm_TK.tolist() == [[20], [16]]


def test_experts_of_other_ranks_are_not_here() -> None:
    layer = facts(FakeExperts(), expert_map_E=torch.tensor([-1, 0, -1, 1]))
    assert local_ids(layer, torch.tensor([[1, 0], [3, -1]])).tolist() == [[1, -1], [3, -1]]
    assert local_ids(facts(FakeExperts()), IDS_TK).tolist() == IDS_TK.tolist()


def test_a_bounded_kernel_is_called_with_no_more_rows_than_fit() -> None:
    """vLLM locks a kernel's workspace: six rows in calls of four are those of one call."""
    experts, ids_TK = FakeExperts(), torch.tensor([[1, 0], [3, 2], [1, 3]], dtype=torch.int32)
    x_TH, weight_TK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.ones(3, 2)
    rows_TKH = expert_rows(dataclasses.replace(facts(experts), call_rows=4), x_TH, weight_TK, ids_TK)
    assert experts.calls == [(4, 1), (2, 1)]
    assert torch.equal(rows_TKH, expert_rows(facts(FakeExperts()), x_TH, weight_TK, ids_TK))
