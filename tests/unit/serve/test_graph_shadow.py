"""The shadow router under captured graphs measures what the eager one measures, replay after replay."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routing_cases import CASES, E, H, RoutingCase, layer_with

from reap_serve.adapter.routing import RoutedLayer, add_routing_hook
from reap_serve.record.captured_rows import Graphs
from reap_serve.record.requests import Requests
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.step import BatchRows
from reap_serve.serve import live_build
from reap_serve.serve.graph_shadow import PLACES, GraphShadow
from reap_serve.serve.shadow import EngineShadow
from reap_serve.serve.sidecar import FullRouter

sys.path.insert(0, str(Path(__file__).parents[1] / "record"))

from graph_replay import capture, capturing, kernels_of

CPU = torch.device("cpu")
LAYERS, SIZES, MAX_ROWS = 2, (4, 8), 32
# The last case scales by a tensor inside its function, which no checkpoint tensor tells of.
SHADOWED = [case for case in CASES if "tensor by expert" not in case.name]


class Engine:
    """Two pruned layers with their full routers beside them, and requests.

    Args:
        case: Their router.
        graphs: Captured at four and eight rows; else eager.
        fraction: Of the tokens or steps that are measured.
    """

    def __init__(self, case: RoutingCase, *, graphs: bool, fraction: float = 1.0) -> None:
        random = torch.Generator().manual_seed(5)
        bias_E, self.weight_LEH = torch.randn(E, generator=random), torch.randn(LAYERS, E, H, generator=random)
        self.kept_D = torch.tensor(case.kept)
        self.requests = Requests(max_slices=8)
        self.routers = [case.make(len(case.kept), bias_E[self.kept_D]) for _ in range(LAYERS)]
        layers, full = [], {}
        for index, router in enumerate(self.routers):
            layer = layer_with(router, len(case.kept), index)
            add_routing_hook(layer, traced=False)
            layers.append(RoutedLayer(layer))
            vectors = (bias_E,) if "bias" in case.name else ()
            full[index] = FullRouter(self.weight_LEH[index], vectors, case.kept)
        common = layers, full, CPU, self.requests, fraction
        self.shadow = GraphShadow(*common, Graphs(SIZES[-1], capturing)) if graphs else EngineShadow(*common)
        self.x_LTH = torch.zeros(LAYERS, MAX_ROWS, H)
        self.logits_LTD = torch.zeros(LAYERS, MAX_ROWS, len(case.kept))
        self.positions: dict[str, int] = {}
        self.graphs: dict[int, Any] = {}
        if graphs:
            loaded = kernels_of(lambda: self.forward(SIZES[-1]))
            held = (self.x_LTH, self.logits_LTD, self.shadow, bias_E, [vars(router) for router in self.routers])
            self.graphs = {size: capture(lambda size=size: self.forward(size), held, loaded) for size in SIZES}

    def forward(self, num_rows: int) -> list[torch.Tensor]:
        """What a pass does in the routers."""
        found = []
        for router, x_TH, logits_TD in zip(self.routers, self.x_LTH, self.logits_LTD, strict=True):
            found.extend(router.select_experts(x_TH[:num_rows], logits_TD[:num_rows]))
        return found

    def fill(self, random: torch.Generator, num_rows: int) -> None:
        """New rows; those behind are padding, of which nothing may be read."""
        self.x_LTH[:, num_rows:], self.logits_LTD[:, num_rows:] = torch.nan, torch.nan
        self.x_LTH[:, :num_rows] = torch.randn(LAYERS, num_rows, H, generator=random)
        logits_LTE = self.x_LTH @ self.weight_LEH.transpose(1, 2)
        self.logits_LTD[:, :num_rows] = logits_LTE[:, :num_rows, self.kept_D]

    def step(self, rows: dict[str, int], random: torch.Generator) -> None:
        """A step in which each request, in the slice of its name, brings some rows."""
        for name, count in rows.items():
            if name not in self.positions:
                self.requests.add(name, count, {"reap_slice": name})
            self.positions.setdefault(name, 0)
        step = self.requests.step(BatchRows(list(rows), list(rows.values()), [self.positions[name] for name in rows]))
        num_rows = sum(rows.values())
        self.fill(random, num_rows)
        self.shadow.begin(step)
        size = next((size for size in self.graphs if size >= num_rows), None)
        if size is None:
            self.forward(num_rows)
        else:
            self.graphs[size].replay()
        self.shadow.end()
        for name, count in rows.items():
            self.positions[name] += count

    def fractions(self) -> dict[str, float]:
        """What was found, by slice."""
        self.shadow.settle()
        return self.shadow.gate_mass.fractions(self.requests.slices)


# Whole graphs, padding rows, a smaller graph, slices in another order, and new ones.
STEPS: list[dict[str, int]] = [
    {"code": 3, "chat": 5},
    {"code": 1, "chat": 1},
    {"chat": 1, "code": 1, "law": 4},
    {"law": 1},
    {"code": 1, "law": 1, "chat": 1},
]


@pytest.mark.parametrize("case", SHADOWED, ids=lambda case: case.name)
def test_replays_measure_what_the_eager_shadow_measures(case: RoutingCase) -> None:
    eager, graphs = Engine(case, graphs=False), Engine(case, graphs=True)
    assert graphs.fractions() == {}
    for number, rows in enumerate(STEPS * 3):
        for engine in (eager, graphs):
            engine.step(rows, torch.Generator().manual_seed(number))
        if number % 4 == 0:
            # Somebody asks now and then, also before the places are full.
            assert graphs.fractions() == pytest.approx(eager.fractions())
    expected = eager.fractions()
    assert graphs.fractions() == pytest.approx(expected)
    assert set(expected) == {"code", "chat", "law"}
    assert min(expected.values()) > 0.05
    assert graphs.shadow.refusal is None
    assert graphs.shadow.gate_mass.tokens == eager.shadow.gate_mass.tokens == 3 * (8 + 2 + 6 + 1 + 3)


def test_full_places_are_measured_before_further_rows_come() -> None:
    eager, graphs = Engine(CASES[0], graphs=False), Engine(CASES[0], graphs=True)
    tokens = []
    for number in range(2 * PLACES // 8 + 1):
        for engine in (eager, graphs):
            engine.step({"code": 3, "chat": 5}, torch.Generator().manual_seed(number))
        tokens.append(graphs.shadow.gate_mass.tokens)
    assert tokens[PLACES // 8 - 1 : PLACES // 8 + 1] == [0, PLACES]
    assert graphs.fractions() == pytest.approx(eager.fractions())


def test_a_served_choice_keeps_its_bits() -> None:
    case = CASES[3]
    engine = Engine(case, graphs=True)
    engine.step({"code": 6}, torch.Generator().manual_seed(1))
    plain = [
        each
        for router, x_TH, logits_TD in zip(engine.routers, engine.x_LTH, engine.logits_LTD, strict=True)
        for each in type(router).reap_plain_class._compute_routing(router, x_TH, logits_TD, None)
    ]
    assert all(torch.equal(found[:6], wanted[:6]) for found, wanted in zip(engine.graphs[8].output, plain, strict=True))


def test_dummy_runs_and_steps_that_are_not_measured_leave_no_trace() -> None:
    engine = Engine(CASES[0], graphs=True)
    shadow: Any = engine.shadow
    engine.step({"code": 4}, torch.Generator().manual_seed(1))
    found = engine.fractions()
    # A dummy run between two steps, then a step that the sample passes over.
    engine.fill(torch.Generator().manual_seed(2), 8)
    engine.graphs[8].replay()
    shadow._sampler.fraction = 0.0
    engine.step({"chat": 8}, torch.Generator().manual_seed(3))
    assert engine.fractions() == found
    assert shadow._place_N.tolist() == [PLACES] * 8
    assert shadow.gate_mass.tokens == 4
    shadow._sampler.fraction = 1.0
    engine.step({"chat": 1}, torch.Generator().manual_seed(4))
    assert set(engine.fractions()) == {"code", "chat"}


def test_a_failed_step_counts_for_nothing_and_a_reset_forgets_what_is_held() -> None:
    engine = Engine(CASES[0], graphs=True)
    engine.requests.add("a", 4, None)
    engine.shadow.begin(engine.requests.step(BatchRows(["a"], [4], [0])))
    engine.shadow.discard()
    engine.shadow.end()
    assert engine.fractions() == {}
    engine.step({"code": 4}, torch.Generator().manual_seed(1))
    engine.shadow.reset()
    assert engine.fractions() == {}


def test_a_step_larger_than_any_graph_is_measured_in_python() -> None:
    """Graphs of eight rows, of which eight land: thirty sampled rows are measured at once, and ten held ones later."""
    eager, graphs = Engine(CASES[0], graphs=False), Engine(CASES[0], graphs=True)
    for number, rows in enumerate(({"code": 3}, {"chat": 30}, {"code": 1}, {"chat": 1, "law": 6})):
        for engine in (eager, graphs):
            engine.step(rows, torch.Generator().manual_seed(number))
    assert graphs.shadow.gate_mass.tokens == 30
    assert graphs.fractions() == pytest.approx(eager.fractions())
    assert graphs.shadow.gate_mass.tokens == 3 + 30 + 1 + 7


def test_no_step_of_a_graph_draws_more_rows_than_land() -> None:
    """512 rows a graph, 64 land: an eighth at most, whatever is asked for."""
    layer = layer_with(CASES[0].make(len(CASES[0].kept), torch.zeros(E)), len(CASES[0].kept))
    add_routing_hook(layer, traced=False)
    requests = Requests(max_slices=4)
    full = FullRouter(torch.randn(E, H), (), CASES[0].kept)
    shadow = GraphShadow([RoutedLayer(layer)], {0: full}, CPU, requests, 1.0, Graphs(512, capturing))
    assert shadow._sampler.fraction == 0.125
    requests.add("a", 512, None)
    step = requests.step(BatchRows(["a"], [512], [0]))
    landed = []
    for _ in range(50):
        shadow.begin(step)
        landed.append(shadow._landing)
        shadow.end()
        shadow._held = 0
    assert set(landed) == {64}
    assert shadow.held_bytes == (PLACES + 1) * 4 * (H + len(CASES[0].kept))


def test_a_router_that_sees_something_else_is_not_measured() -> None:
    engine = Engine(CASES[0], graphs=True)
    engine.weight_LEH = engine.weight_LEH + 1
    engine.step({"code": 3}, torch.Generator().manual_seed(1))
    assert engine.fractions() == {}
    assert "differ" in str(engine.shadow.refusal)
    engine.step({"code": 1}, torch.Generator().manual_seed(2))
    assert engine.fractions() == {}


@pytest.mark.parametrize("graphs", [False, True])
def test_an_engine_gets_the_shadow_of_its_graph_mode(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_build, "open_model", lambda reference: SimpleNamespace(path=reference))
    monkeypatch.setattr(live_build, "read_sidecar", lambda path: {})
    engine: Any = SimpleNamespace(
        settings=ObserveSettings(),
        graphs=Graphs(8, capturing) if graphs else None,
        model_reference="pruned",
        routed_layers=[],
        device=CPU,
    )
    shadow, refusal = live_build._build_shadow(engine, Requests(max_slices=4))
    assert refusal is None
    assert isinstance(shadow, GraphShadow) == graphs
    assert shadow is not None
    engine.settings = ObserveSettings(drift_fraction=0.0)
    assert live_build._build_shadow(engine, Requests(max_slices=4)) == (None, None)
