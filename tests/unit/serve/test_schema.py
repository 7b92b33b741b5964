"""Requests made from the routes' own OpenAPI document, and broken ones: none of them is answered by a 5xx."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, live_engine
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from routing_cases import E
from test_routes import KEY, NAMES, client_of

from reap_serve.architectures.spec import RoutingLimits
from reap_serve.record.settings import ObserveSettings
from reap_serve.serve.plan_check import ServedModel

schemathesis = pytest.importorskip("schemathesis")


def test_no_request_breaks_the_server() -> None:
    """Sixty requests a route and mode, from the document and against it."""
    limits = RoutingLimits(num_experts=E, top_k=3, num_groups=1, top_k_groups=1, moe_layers=(0,))
    client = client_of(FakeEngine(live_engine()), ObserveSettings(), ServedModel(Path(), MODEL, limits, NAMES))
    document = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    codes: Counter[int] = Counter()
    for operation in document.get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                response = case.call(headers=KEY)
                codes[response.status_code] += 1
                assert response.status_code < 500, response.text
                assert response.status_code < 400 or response.json().keys() & {"error", "detail"}

            with contextlib.suppress(Unsatisfiable):
                ask()
    assert codes.total() > 100
    assert min(codes) == 200
    assert max(codes) >= 400
