"""A masked row is routed as the pruned checkpoint's router would route it; every other row is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import CASES, E, H, K, RoutingCase, dense, layer_with

from reap_serve.adapter.routing import RoutedLayer, add_routing_hook
from reap_serve.record.requests import Requests
from reap_serve.record.settings import MAX_PLANS
from reap_serve.record.step import BatchRows, NewRequest
from reap_serve.serve.mask import PLAN_ARGUMENT, EngineMasks

CPU = torch.device("cpu")


class Masked:
    """An engine's masks, and its requests."""

    def __init__(self, layers: list[Any], fraction: float) -> None:
        self.requests = Requests(max_slices=4)
        self.masks = EngineMasks(layers, CPU, self.requests, drift_fraction=fraction)
        self.load, self.gate_mass = self.masks.load, self.masks.gate_mass

    def admit(self, request: str, rows: int, arguments: dict[str, object] | None) -> bool:
        """A request enters; whether it is under a plan."""
        plan = self.masks.plan_of(NewRequest(request, rows, arguments))
        self.requests.add(request, rows, arguments, plan, answer_only=plan in self.masks.answer_only)
        return plan is not None

    def label(self, batch: BatchRows) -> None:
        """A step's rows are there."""
        self.masks.begin(self.requests.step(batch))


def masks_on(router: object, fraction: float = 1.0) -> Masked:
    """Masks of an engine with one layer."""
    layer = layer_with(router)
    add_routing_hook(layer, traced=False)
    return Masked([RoutedLayer(layer)], fraction)


def step(masks: Masked, requests: dict[str, tuple[str | None, int]]) -> None:
    """A step in which each request brings some rows, in this order."""
    for request, (plan, rows) in requests.items():
        masks.admit(request, rows, None if plan is None else {PLAN_ARGUMENT: plan})
    masks.label(BatchRows(list(requests), [rows for _, rows in requests.values()], [0] * len(requests)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.1, 1.0, 8.0]))
def test_a_masked_row_is_routed_like_the_pruned_checkpoint(case: RoutingCase, seed: int, spread: float) -> None:
    random = torch.Generator().manual_seed(seed)
    # Biases larger than any sigmoid: with logits of -inf alone, a dropped expert's bias would win.
    bias_E = 3 * torch.randn(E, generator=random)
    logits_TE = spread * torch.randn(6, E, generator=random)
    x_TH = torch.randn(6, H, generator=random)
    kept_D = torch.tensor(case.kept)
    router = case.make(E, bias_E)
    plain = case.make(E, bias_E).select_experts(x_TH, logits_TE)
    masks = masks_on(router)
    masks.load("p", {0: case.kept})
    step(masks, {"base": (None, 2), "masked": ("p", 3), "last": (None, 1)})
    weights_TK, ids_TK = router.select_experts(x_TH, logits_TE)

    pruned = case.make(len(case.kept), bias_E[kept_D]).select_experts(x_TH[2:5], logits_TE[2:5][:, kept_D])
    expected = dense(pruned[0], kept_D[pruned[1].long()], E)
    torch.testing.assert_close(dense(weights_TK[2:5], ids_TK[2:5], E), expected, rtol=1e-6, atol=1e-7)
    for rows in (slice(0, 2), slice(5, 6)):
        assert torch.equal(weights_TK[rows], plain[0][rows])
        assert torch.equal(ids_TK[rows], plain[1][rows])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_plans_share_a_step(case: RoutingCase) -> None:
    random = torch.Generator().manual_seed(3)
    bias_E, logits_TE, x_TH = torch.randn(E, generator=random), torch.randn(4, E, generator=random), torch.zeros(4, H)
    router = case.make(E, bias_E)
    masks = masks_on(router)
    everything = tuple(range(E))
    masks.load("some", {0: case.kept})
    masks.load("all", {0: everything})
    step(masks, {"a": ("some", 1), "b": ("all", 2), "c": ("some", 1)})
    weights_TK, ids_TK = router.select_experts(x_TH, logits_TE)
    plain = case.make(E, bias_E).select_experts(x_TH, logits_TE)
    assert torch.equal(dense(weights_TK[1:3], ids_TK[1:3], E), dense(plain[0][1:3], plain[1][1:3], E))
    dropped = sorted(set(everything) - set(case.kept))
    assert not torch.isin(ids_TK[[0, 3]], torch.tensor(dropped)).any()


def test_without_a_masked_row_the_result_is_bit_identical() -> None:
    case = CASES[0]
    logits_TE, x_TH = torch.randn(5, E), torch.zeros(5, H)
    router = case.make(E, torch.zeros(E))
    masks = masks_on(router)
    plain = case.make(E, torch.zeros(E)).select_experts(x_TH, logits_TE)
    for load in (False, True):
        if load:
            masks.load("p", {0: case.kept})
        step(masks, {"a": (None, 5)})
        found = router.select_experts(x_TH, logits_TE)
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], plain[1])


def test_padding_and_dummy_runs_are_not_masked() -> None:
    case = CASES[0]
    logits_TE, x_TH = torch.randn(5, E), torch.zeros(5, H)
    router = case.make(E, torch.zeros(E))
    masks = masks_on(router)
    masks.load("p", {0: case.kept})
    plain = case.make(E, torch.zeros(E)).select_experts(x_TH, logits_TE)
    step(masks, {"a": ("p", 3)})
    weights_TK, _ = router.select_experts(x_TH, logits_TE)
    assert torch.equal(weights_TK[3:], plain[0][3:])
    masks.masks.end()
    assert torch.equal(router.select_experts(x_TH, logits_TE)[0], plain[0])


def test_layers_keep_different_experts() -> None:
    case = CASES[0]
    layers = [layer_with(case.make(E, torch.zeros(E)), index=index) for index in (0, 2)]
    for layer in layers:
        add_routing_hook(layer, traced=False)
    masks = Masked([RoutedLayer(layer) for layer in layers], 0.0)
    masks.load("p", {0: (0, 1, 2), 1: (3, 4, 5), 2: (9, 10, 11)})
    step(masks, {"a": ("p", 4)})
    chosen = [
        set(layer.router.select_experts(torch.zeros(4, H), torch.randn(4, E))[1].flatten().tolist()) for layer in layers
    ]
    assert chosen == [{0, 1, 2}, {9, 10, 11}]


def test_dropped_gate_mass_is_the_share_of_the_full_routers_weights() -> None:
    router = CASES[0].make(E, torch.zeros(E))
    masks = masks_on(router)
    masks.load("p", {0: tuple(range(6))})
    # Top three of each row by hand: experts 0, 1, 11 with softmax weights 1/2, 1/4, 1/4.
    row_E = torch.full((E,), -100.0)
    row_E[[0, 1, 11]] = torch.log(torch.tensor([2.0, 1.0, 1.0]))
    step(masks, {"a": ("p", 2)})
    router.select_experts(torch.zeros(2, H), row_E.expand(2, E).contiguous())
    assert masks.gate_mass["p"].fractions(masks.requests.slices) == {"default": pytest.approx(0.25)}


def test_rows_computed_again_after_a_preemption_are_masked_but_not_measured() -> None:
    router = CASES[0].make(E, torch.zeros(E))
    masks = masks_on(router)
    masks.load("p", {0: tuple(range(6))})
    masks.admit("a", 3, {PLAN_ARGUMENT: "p"})
    for new in (True, False):
        masks.label(BatchRows(["a"], [3], [0]))
        [group] = masks.masks.step
        assert group.slots.tolist() == [0 if new else masks.requests.trash_slot] * 3
        _, ids_TK = router.select_experts(torch.zeros(3, H), torch.randn(3, E))
        assert int(ids_TK.max()) < 6


def test_a_plan_for_answers_leaves_the_prompts_routing_bit_identical() -> None:
    router = CASES[0].make(E, torch.zeros(E))
    masks = masks_on(router)
    x_TH, logits_TE = torch.zeros(3, H), torch.randn(3, E)
    plain = router.select_experts(x_TH, logits_TE)
    masks.load("p", {0: tuple(range(6))}, answer_only=True)
    masks.admit("a", 2, {PLAN_ARGUMENT: "p"})
    masks.label(BatchRows(["a"], [3], [0]))
    weights_TK, ids_TK = router.select_experts(x_TH, logits_TE)
    assert torch.equal(weights_TK[:2], plain[0][:2])
    assert torch.equal(ids_TK[:2], plain[1][:2])
    assert int(ids_TK[2].max()) < 6


def test_an_argument_means_nothing_while_no_plan_is_loaded() -> None:
    masks = masks_on(CASES[0].make(E, torch.zeros(E)))
    assert not masks.admit("a", 3, {PLAN_ARGUMENT: "p"})
    masks.load("p", {0: tuple(range(6))})
    with pytest.raises(ValueError, match="not loaded"):
        masks.admit("b", 3, {PLAN_ARGUMENT: "q"})


def test_plans_are_bounded_and_a_repeated_one_is_free() -> None:
    masks = masks_on(CASES[0].make(E, torch.zeros(E)))
    for number in range(MAX_PLANS):
        masks.load(f"p{number}", {0: tuple(range(6))})
    masks.load("p0", {0: tuple(range(6))})
    with pytest.raises(ValueError, match="32 plans are loaded; delete one"):
        masks.load("one more", {0: tuple(range(K))})
    masks.masks.release("p7")
    masks.load("one more", {0: tuple(range(K))})


def test_a_released_plan_masks_a_request_that_comes_late() -> None:
    masks = masks_on(CASES[0].make(E, torch.zeros(E)))
    masks.load("p", {0: tuple(range(6))})
    masks.masks.release("p")
    assert masks.gate_mass == {}
    assert not masks.admit("a", 1, None)
    assert masks.admit("b", 1, {PLAN_ARGUMENT: "p"})
    masks.label(BatchRows(["a", "b"], [1, 1], [0, 0]))
    assert [group.plan for group in masks.masks.step] == ["p"]
    with pytest.raises(ValueError, match="not loaded"):
        masks.admit("c", 1, {PLAN_ARGUMENT: "unknown"})


def test_a_finished_request_is_forgotten() -> None:
    masks = masks_on(CASES[0].make(E, torch.zeros(E)))
    masks.load("p", {0: tuple(range(6))})
    masks.admit("a", 3, {PLAN_ARGUMENT: "p"})
    masks.requests.finish(["a"])
    masks.label(BatchRows(["a"], [3], [0]))
    assert masks.masks.step == ()
