"""Plans inside captured graphs route each row as the eager mask does, replay after replay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from routing_cases import CASES, PLANS, E, H, K, RoutingCase, dense, layer_with

from reap_serve.adapter.routing import RoutedLayer, Router, add_routing_hook
from reap_serve.record.requests import Requests
from reap_serve.record.step import BatchRows, NewRequest
from reap_serve.serve.graph_mask import GraphMasks
from reap_serve.serve.mask import PLAN_ARGUMENT, EngineMasks, LayerPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "record"))

from graph_replay import capture, kernels_of

CPU = torch.device("cpu")
SIZES, PLACES = (4, 8), 3


class Engine:
    """One layer with masks, and requests of one row each.

    Args:
        case: Its router.
        bias_E: The router's correction bias.
        graphs: Captured at four and eight rows, before any plan is loaded; else eager.
        places: For plans in a graph.
    """

    def __init__(self, case: RoutingCase, bias_E: torch.Tensor, *, graphs: bool, places: int = PLACES) -> None:
        layer = layer_with(case.make(E, bias_E))
        add_routing_hook(layer, traced=False)
        self.router, self.requests = layer.router, Requests(max_slices=16)
        common = [RoutedLayer(layer)], CPU, self.requests, 1.0
        self.masks = GraphMasks(*common, SIZES[-1], places) if graphs else EngineMasks(*common)
        self.x_TH, self.logits_TE = torch.zeros(SIZES[-1], H), torch.zeros(SIZES[-1], E)
        self.steps = 0
        self.graphs: dict[int, Any] = {}
        if graphs:
            mask = layer.router.reap_routing
            held = self.x_TH, self.logits_TE, bias_E, vars(self.masks), vars(mask)
            loaded = kernels_of(lambda: self.forward(SIZES[-1]))
            self.graphs = {size: capture(lambda size=size: self.forward(size), held, loaded) for size in SIZES}

    def forward(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a pass does in the router."""
        weights_TK, ids_TK = self.router.select_experts(self.x_TH[:num_rows], self.logits_TE[:num_rows])
        return weights_TK, ids_TK

    def load(self, *plans: str) -> None:
        """Loads plans between two steps."""
        for plan in plans:
            self.masks.load(plan, PLANS[plan])

    def enter(self, name: str, plan: str | None) -> None:
        """A request enters, its slice its plan's."""
        arguments: dict[str, object] = {"reap_slice": str(plan)}
        if plan is not None:
            arguments[PLAN_ARGUMENT] = plan
        self.requests.add(name, 1, arguments, self.masks.plan_of(NewRequest(name, 1, arguments)))

    def step(self, plans: list[str | None]) -> torch.Tensor:
        """Gate weights by expert of the rows of a step, each under a plan."""
        self.steps += 1
        random = torch.Generator().manual_seed(self.steps)
        names = [f"{self.steps}.{row}" for row in range(len(plans))]
        for name, plan in zip(names, plans, strict=True):
            self.enter(name, plan)
        step = self.requests.step(BatchRows(names, [1] * len(names), [0] * len(names)))
        self.x_TH.copy_(torch.randn(SIZES[-1], H, generator=random))
        self.logits_TE.copy_(4 * torch.randn(SIZES[-1], E, generator=random))
        # Behind the rows is padding.
        self.x_TH[len(plans) :], self.logits_TE[len(plans) :] = torch.nan, torch.nan
        if step.plan_rows:
            self.masks.begin(step)
        if self.graphs:
            graph = self.graphs[next(size for size in SIZES if size >= len(plans))]
            graph.replay()
            weights_TK, ids_TK = graph.output
        else:
            weights_TK, ids_TK = self.forward(len(plans))
        self.masks.end()
        self.requests.finish(names)
        return dense(weights_TK[: len(plans)], ids_TK[: len(plans)], E)


STEPS: list[list[str | None]] = [
    ["some", None, "all", "some"],
    [None, None],
    ["all", "all", "some", None, "some", "some", "all"],
    ["some"],
    [None, "some", None, "some", "some", "some", "some", "some"],
]


def both(case: RoutingCase, places: int = PLACES) -> tuple[Engine, Engine]:
    """An eager engine and one with graphs; biases larger than any sigmoid, which would win against a score of 0."""
    bias_E = 3 * torch.randn(E, generator=torch.Generator().manual_seed(1))
    return Engine(case, bias_E, graphs=False), Engine(case, bias_E, graphs=True, places=places)


def compare(eager: Engine, graphs: Engine, plans: list[str | None], *, exact: bool = False) -> None:
    """A step of both, which choose alike."""
    expected, found = eager.step(plans), graphs.step(plans)
    assert torch.equal(found != 0, expected != 0)
    if exact:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replays_route_each_row_as_eager_masks_do(case: RoutingCase) -> None:
    engines = eager, graphs = both(case)
    for engine in engines:
        engine.load("some", "all")
    for plans in STEPS:
        compare(eager, graphs, plans, exact="custom" in case.name)
    assert graphs.masks.masked_tokens == eager.masks.masked_tokens == 3 + 6 + 1 + 6
    for plan in ("some", "all"):
        found_mass, expected_mass = graphs.masks.gate_mass[plan], eager.masks.gate_mass[plan]
        assert found_mass.tokens == expected_mass.tokens
        expected = expected_mass.fractions(eager.requests.slices)
        assert found_mass.fractions(graphs.requests.slices) == pytest.approx(expected)
        assert set(expected) == {plan}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans_come_and_go_without_a_new_capture(case: RoutingCase) -> None:
    engines = eager, graphs = both(case)
    compare(eager, graphs, [None, None, None])
    for engine in engines:
        engine.load("some")
    compare(eager, graphs, ["some", None, "some", "some", "some"])
    for engine in engines:
        engine.load("all", "others")
    compare(eager, graphs, ["others", "some", "all", None, "others"])
    for engine in engines:
        engine.masks.release("some")
        engine.load("late")
    compare(eager, graphs, ["late", "others", "late", "all", None, "late"])
    for engine in engines:
        engine.masks.unload_all()
        engine.load("others", "some")
    compare(eager, graphs, ["some", "others", None, "some"])
    expected = eager.masks.gate_mass["some"].fractions(eager.requests.slices)
    assert graphs.masks.gate_mass["some"].fractions(graphs.requests.slices) == pytest.approx(expected)


def test_a_place_is_free_when_its_plan_is_released() -> None:
    eager, graphs = both(CASES[3], places=2)
    graphs.load("some", "all")
    with pytest.raises(ValueError, match=r"each of the places .* \(2\); delete one .*, or start with --mask-places 3"):
        graphs.load("late")
    graphs.masks.release("all")
    eager.load("some", "late")
    graphs.load("late")
    compare(eager, graphs, ["late", "some", None])
    assert set(graphs.masks.gate_mass) == {"some", "late"}
    more = both(CASES[3], places=3)[1]
    more.load("some", "all", "late")


def test_a_request_that_comes_late_finds_its_plan_unless_another_took_the_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    eager, graphs = both(CASES[3], places=2)
    for engine in (eager, graphs):
        engine.load("some", "all")
        engine.masks.release("some")
    compare(eager, graphs, ["some", "all", None])
    assert "some" in graphs.masks.gate_mass
    for plan in ("all", "some"):
        graphs.masks.release(plan)
    # The one that was released first leaves its place first.
    graphs.load("late")
    assert set(graphs.masks._places) == {"some", "late"}  # type: ignore[attr-defined]
    graphs.load("some")
    graphs.enter("waited", "all")
    assert graphs.requests.under_plan == 0
    assert "request waited is answered by the full model" in caplog.text


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_rows_without_a_plan_keep_the_routers_bits(case: RoutingCase) -> None:
    bias_E = torch.randn(E, generator=torch.Generator().manual_seed(1))
    engine, plain = Engine(case, bias_E, graphs=True), case.make(E, bias_E)
    engine.load("some")
    engine.step(["some"] * 8)
    # A dummy run follows: no row of it is under the plans of the step before, and nothing of it counts.
    found = engine.masks.gate_mass["some"].fractions(engine.requests.slices)
    engine.graphs[8].replay()
    weights_TK, ids_TK = plain.select_experts(engine.x_TH, engine.logits_TE)
    assert torch.equal(engine.graphs[8].output[0], weights_TK)
    assert torch.equal(engine.graphs[8].output[1], ids_TK)
    assert engine.masks.gate_mass["some"].fractions(engine.requests.slices) == found
    masks: Any = engine.masks
    assert masks._place_T.tolist() == [PLACES] * 8
    assert weights_TK.shape == (8, K)


def test_places_cost_nothing_more_where_a_router_has_no_bias() -> None:
    def operators(case: RoutingCase, places: int) -> int:
        return len(Engine(case, torch.zeros(E), graphs=True, places=places).graphs[8].operators)

    plain, biased = CASES[0], CASES[3]
    assert operators(plain, 1) == operators(plain, 32)
    assert operators(biased, 1) < operators(biased, 2)


def test_steps_that_do_not_measure_leave_the_sums_alone() -> None:
    engine = Engine(CASES[0], torch.zeros(E), graphs=True)
    engine.load("some")
    engine.step(["some", None, "some"])
    found = engine.masks.gate_mass["some"].fractions(engine.requests.slices)
    engine.masks._drift_fraction = 0.0
    engine.step(["some"] * 5)
    assert engine.masks.gate_mass["some"].fractions(engine.requests.slices) == found
    assert engine.masks.gate_mass["some"].tokens == 2


def test_padding_rows_without_experts_are_passed_over() -> None:
    """vLLM gives padding rows the id -1, which is no index on a GPU."""
    engine = Engine(CASES[0], torch.zeros(E), graphs=True)
    weights_TK, ids_TK = torch.zeros(4, K), torch.full((4, K), -1, dtype=torch.int32)
    engine.router.reap_routing.routed(engine.x_TH[:4], engine.logits_TE[:4], weights_TK, ids_TK)
    assert ids_TK.eq(-1).all()


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's operator needs AVX512")
def test_the_square_root_of_softplus_with_a_bias() -> None:
    """As DeepSeek V4 routes: vLLM's operator takes no other sizes than such."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    random = torch.Generator().manual_seed(4)
    bias_E, logits_TE = 3 * torch.randn(256, generator=random), 4 * torch.randn(8, 256, generator=random)
    router = CPURouter(6, 256, scoring_func="sqrtsoftplus", e_score_correction_bias=bias_E, routed_scaling_factor=1.5)
    layer = layer_with(router, 256)
    add_routing_hook(layer, traced=False)
    kept = tuple(range(0, 256, 2))
    masks = GraphMasks([RoutedLayer(layer)], CPU, Requests(max_slices=4), 1.0, 8, 2)
    masks.load("even", {0: kept})
    masks._place_T[:] = masks._places["even"]
    found = router.select_experts(torch.zeros(8, H), logits_TE)
    expected = LayerPlan(Router(router), kept, 256, CPU).route(torch.zeros(8, H), logits_TE, torch.int32)
    assert torch.equal(dense(*found, 256), dense(*expected, 256))
