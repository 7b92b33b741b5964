"""What a router's operator costs a compiled engine without hooks: nothing of it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from reap_serve.adapter.routing import Router as PlainRouter
from reap_serve.adapter.routing import add_routing_hook, set_routing_hook
from reap_serve.adapter.stand_in import SkippedRouting

X_TH = torch.zeros(1, 2)


class Router:
    """Chooses expert 0."""

    def _compute_routing(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, indices_type: Any, *, input_ids: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)


class Second:
    """Writes expert 1."""

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        ids_TK.fill_(1)


def layer(traced: bool) -> Any:
    built: Any = SimpleNamespace(router=Router(), layer_name="model.layers.0.mlp.experts")
    add_routing_hook(built, traced)
    return built


def chosen(router: Any) -> int:
    return int(router._compute_routing(X_TH, torch.zeros(1, 2), None)[1])


def test_an_eager_router_changes_its_class_when_a_hook_is_set() -> None:
    eager = layer(traced=False)
    assert type(eager.router) is Router
    set_routing_hook(eager, Second())
    assert chosen(eager.router) == 1
    assert int(PlainRouter(eager.router).route(X_TH, torch.zeros(1, 2), torch.int32)[1]) == 0


def test_a_traced_router_has_the_place_of_its_hook_from_the_start() -> None:
    traced = layer(traced=True)
    assert type(traced.router) is not Router
    assert chosen(traced.router) == 0
    before = type(traced.router)
    set_routing_hook(traced, Second())
    assert type(traced.router) is before
    assert chosen(traced.router) == 1


def test_a_second_hook_sees_what_the_first_has_left() -> None:
    eager, seen = layer(traced=False), []

    class Watch:
        def routed(
            self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
        ) -> None:
            seen.append(int(ids_TK))

    for hook in (Watch(), Second(), Watch()):
        set_routing_hook(eager, hook)
    assert chosen(eager.router) == 1
    assert seen == [0, 1]


def test_the_operator_is_skipped_while_a_step_without_hooks_runs() -> None:
    traced = layer(traced=True)
    operator = torch.ops.reap_serve.mask_routing
    skipped = SkippedRouting([traced])
    skipped.step_begins()
    # The operator itself would look for the layer in vLLM's forward pass, of which there is none.
    torch.ops.reap_serve.mask_routing.default(torch.ones(1, 1), torch.zeros(1, 1), X_TH, X_TH, "layer")
    assert torch.ops.reap_serve.mask_routing is not operator
    hooked = layer(traced=True)
    # What is traced next has to find the operator.
    assert torch.ops.reap_serve.mask_routing is operator
    set_routing_hook(hooked, Second())
    for steps, found in ((skipped, False), (SkippedRouting([hooked]), True), (skipped, False)):
        steps.step_begins()
        assert (torch.ops.reap_serve.mask_routing is operator) == found
    set_routing_hook(traced, Second())
    skipped.step_begins()
    assert torch.ops.reap_serve.mask_routing is operator
