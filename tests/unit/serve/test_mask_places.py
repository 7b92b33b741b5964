"""How many plans a captured graph has places for, as the start of the engine settles, and what refuses without."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routing_cases import CASES, PLANS, E, layer_with

from reap_serve.adapter.routing import RoutedLayer, add_routing_hook
from reap_serve.errors import RequestError
from reap_serve.record.requests import Requests
from reap_serve.record.settings import MAX_PLANS, ObserveSettings, checked_settings
from reap_serve.serve import live_build
from reap_serve.serve.graph_mask import GraphMasks


def engine_with(settings: ObserveSettings, *, graphs: bool) -> Any:
    """A loaded engine of one layer."""
    layer = layer_with(CASES[0].make(E, torch.zeros(E)))
    add_routing_hook(layer, traced=False)
    return SimpleNamespace(
        settings=settings,
        captures_graphs=graphs,
        routes_in_model=False,
        routed_layers=[RoutedLayer(layer)],
        device=torch.device("cpu"),
        max_rows=8,
    )


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"plans": {"a": "a.json", "b": "b.json"}}, 3),
        ({"plans": {"a": "a.json"}, "mask_places": 1}, 1),
        ({"mask_places": 5}, 5),
        ({"plans": {str(number): "a.json" for number in range(40)}}, MAX_PLANS),
    ],
)
def test_graphs_have_as_many_places_as_was_asked_for_or_one_more_than_plans(
    settings: dict[str, Any], places: int
) -> None:
    started = ObserveSettings(**settings)
    masks = live_build._build_masks(engine_with(started, graphs=True), Requests(max_slices=4))
    assert isinstance(masks, GraphMasks)
    assert masks.num_places == places
    assert not isinstance(
        live_build._build_masks(engine_with(started, graphs=False), Requests(max_slices=4)), GraphMasks
    )


@pytest.mark.parametrize("followed", [{"mask_places": 1}, {"plans": {"a": "a.json"}}])
def test_what_graphs_refuse_works_once_its_remedy_is_followed(followed: dict[str, Any]) -> None:
    """Without places the hook is not there, and a graph costs nothing more."""
    plain = engine_with(ObserveSettings(), graphs=True)
    refusal = live_build._mask_refusal(plain)
    assert refusal is not None
    assert "--mask-places N" in refusal
    assert "--plan NAME=PLAN at the start" in refusal
    live_build._build_masks(plain, Requests(max_slices=4))
    assert plain.routed_layers[0]._layer.router.reap_routing is None
    engine = engine_with(ObserveSettings(**followed), graphs=True)
    assert live_build._mask_refusal(engine) is None
    masks = live_build._build_masks(engine, Requests(max_slices=4))
    masks.load("late", PLANS["late"])
    assert live_build._mask_refusal(engine_with(ObserveSettings(), graphs=False)) is None


def test_plans_of_the_start_need_places() -> None:
    with pytest.raises(RequestError, match="mask_places is 1, and 2 plans are given"):
        checked_settings({"plans": {"a": "a.json", "b": "b.json"}, "mask_places": 1})
