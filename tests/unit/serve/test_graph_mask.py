"""Plans inside captured graphs route each row as the eager mask does, replay after replay."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routing_cases import CASES, KEPT_IN_GROUPS, E, H, K, RoutingCase, dense, layer_with

from reap_serve.adapter.routing import RoutedLayer, add_routing_hook
from reap_serve.demo.run import demo_files
from reap_serve.record.requests import Requests
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.step import BatchRows, NewRequest
from reap_serve.serve import live_build
from reap_serve.serve.graph_mask import NO_PLAN, GraphMasks
from reap_serve.serve.mask import PLAN_ARGUMENT, EngineMasks

sys.path.insert(0, str(Path(__file__).parents[1] / "record"))

from graph_replay import capture

CPU = torch.device("cpu")
SIZE = 8
# Every router of `routing_cases` can choose among these.
PLANS = {"some": {0: KEPT_IN_GROUPS}, "all": {0: tuple(range(E))}}


class Engine:
    """One layer with masks, and requests of one row each.

    Args:
        case: Its router.
        bias_E: The router's correction bias.
        graphs: Captured at eight rows; else eager.
    """

    def __init__(self, case: RoutingCase, bias_E: torch.Tensor, *, graphs: bool) -> None:
        layer = layer_with(case.make(E, bias_E))
        add_routing_hook(layer, traced=False)
        self.router, self.requests = layer.router, Requests(max_slices=4)
        routed = [RoutedLayer(layer)]
        self.masks: EngineMasks
        if graphs:
            self.masks = GraphMasks(routed, CPU, self.requests, 1.0, SIZE, PLANS, answer_only=False)
        else:
            self.masks = EngineMasks(routed, CPU, self.requests, 1.0)
        for plan, kept in PLANS.items():
            self.masks.load(plan, kept)
        self.x_TH, self.logits_TE = torch.zeros(SIZE, H), torch.zeros(SIZE, E)
        self.entered = 0
        self.graph: Any = None
        if graphs:
            held = (self.x_TH, self.logits_TE, vars(self.masks), bias_E, self.masks_tensors(layer))
            self.graph = capture(lambda: self.router.select_experts(self.x_TH, self.logits_TE), held)

    def masks_tensors(self, layer: Any) -> list[Any]:
        """What the hook holds."""
        plans = layer.router.reap_routing._plans
        biases = [None if plan._compact is None else plan._compact.correction_bias for plan in plans]
        return [[vars(plan) for plan in plans], biases]

    def step(self, plans: list[str | None], random: torch.Generator) -> torch.Tensor:
        """Gate weights by expert of the rows of a step, each under a plan."""
        names = [f"{self.entered}.{row}" for row in range(len(plans))]
        self.entered += 1
        for name, plan in zip(names, plans, strict=True):
            arguments = None if plan is None else {PLAN_ARGUMENT: plan}
            self.requests.add(name, 1, arguments, self.masks.plan_of(NewRequest(name, 1, arguments)))
        step = self.requests.step(BatchRows(names, [1] * len(names), [0] * len(names)))
        self.x_TH.copy_(torch.randn(SIZE, H, generator=random))
        self.logits_TE.copy_(4 * torch.randn(SIZE, E, generator=random))
        if step.plan_rows:
            self.masks.begin(step)
        if self.graph is None:
            rows = slice(0, len(plans))
            weights_TK, ids_TK = self.router.select_experts(self.x_TH[rows], self.logits_TE[rows])
        else:
            self.graph.replay()
            weights_TK, ids_TK = self.graph.output
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replays_route_each_row_as_eager_masks_do(case: RoutingCase) -> None:
    bias_E = 3 * torch.randn(E, generator=torch.Generator().manual_seed(1))
    eager, graphs = (Engine(case, bias_E, graphs=graphs) for graphs in (False, True))
    randoms = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for plans in STEPS:
        expected, found = eager.step(plans, randoms[0]), graphs.step(plans, randoms[1])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert graphs.masks.masked_tokens == eager.masks.masked_tokens == 3 + 6 + 1 + 6
    for plan in PLANS:
        found_mass, expected_mass = graphs.masks.gate_mass[plan], eager.masks.gate_mass[plan]
        assert found_mass.tokens == expected_mass.tokens
        assert found_mass.fractions(["default"]) == pytest.approx(expected_mass.fractions(["default"]))


def test_rows_without_a_plan_keep_the_routers_bits() -> None:
    case, bias_E = CASES[0], torch.zeros(E)
    engine, plain = Engine(case, bias_E, graphs=True), case.make(E, bias_E)
    engine.step(["some", "some"], torch.Generator().manual_seed(3))
    # A dummy run follows: no row of it is under the plans of the step before.
    engine.graph.replay()
    weights_TK, ids_TK = plain.select_experts(engine.x_TH, engine.logits_TE)
    assert torch.equal(engine.graph.output[0], weights_TK)
    assert torch.equal(engine.graph.output[1], ids_TK)
    assert engine.masks._plan_T.tolist() == [NO_PLAN] * SIZE  # type: ignore[attr-defined]
    assert weights_TK.shape == (SIZE, K)


def test_plans_that_come_later_are_refused_with_what_helps() -> None:
    masks = Engine(CASES[0], torch.zeros(E), graphs=True).masks
    with pytest.raises(ValueError, match="started with; name them with --plan NAME=PLAN at the start"):
        masks.load("late", {0: (0, 1, 2)})
    with pytest.raises(ValueError, match="--enforce-eager"):
        masks.unload_all()
    masks.release("some")
    assert masks.plan_of(NewRequest("a", 1, {PLAN_ARGUMENT: "some"})) == "some"


def engine_with(settings: ObserveSettings, *, graphs: bool) -> Any:
    """A loaded engine of the embedded model, without layers."""
    return SimpleNamespace(
        settings=settings,
        captures_graphs=graphs,
        routes_in_model=False,
        routed_layers=[],
        device=CPU,
        max_rows=SIZE,
        model_reference=str(demo_files().model),
    )


def test_an_engine_with_graphs_masks_by_the_plans_of_its_start(tmp_path: Path) -> None:
    config = json.loads((demo_files().model / "config.json").read_text())
    kept, dropped = list(range(0, config["num_experts"], 2)), list(range(1, config["num_experts"], 2))
    layers = [
        {"layer": f"model.layers.{index}.mlp.experts", "index": index, "kept": kept, "dropped": dropped}
        for index in range(config["num_hidden_layers"])
    ]
    plan = {"schema_version": 1, "model": {}, "criterion": "by hand", "layers": layers}
    file = tmp_path / "half.json"
    file.write_text(json.dumps(plan))
    started = ObserveSettings(plans={"half": str(file)}, mask_phase="decode")
    requests = Requests(max_slices=4)
    masks = live_build._build_masks(engine_with(started, graphs=True), requests)
    assert isinstance(masks, GraphMasks)
    (plan_id,) = masks.gate_mass
    assert masks.answer_only == {plan_id}
    assert not isinstance(live_build._build_masks(engine_with(started, graphs=False), requests), GraphMasks)


def test_what_graphs_refuse_works_once_its_remedy_is_followed(tmp_path: Path) -> None:
    plain = ObserveSettings()
    refusal = live_build._late_plans(engine_with(plain, graphs=True))
    assert refusal is not None
    assert "--plan NAME=PLAN at the start" in refusal
    assert "--enforce-eager" in refusal
    assert live_build._late_plans(engine_with(plain, graphs=False)) is None
    assert "--enforce-eager" in str(live_build._graph_refusal(engine_with(plain, graphs=True)))
    assert live_build._graph_refusal(engine_with(plain, graphs=False)) is None
