"""The routes with vLLM's own error handlers and key check around them, and an engine of one small layer behind them."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, FakeObserver, live_engine
from fastapi import FastAPI
from fastapi.testclient import TestClient
from routing_cases import E

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.architectures.spec import RoutingLimits
from reap_serve.record.settings import ObserveSettings
from reap_serve.serve.link import EngineLink
from reap_serve.serve.plan_check import ServedModel
from reap_serve.serve.routes import router
from reap_serve.serve.windows import LiveSetup

NAMES = TensorNames(resolve({"model_type": "qwen3_moe"}), 1)
KEPT = [0, 1, 2, 5, 8, 9]
KEY = {"Authorization": "Bearer secret"}


def plan_body(kept: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """A plan as a request carries it."""
    kept = KEPT if kept is None else kept
    layer = {
        "layer": "model.layers.0.mlp.experts",
        "index": 0,
        "kept": kept,
        "dropped": [e for e in range(E) if e not in kept],
    }
    body = {"schema_version": 1, "model": {}, "criterion": "by hand", "layers": [layer]}
    return body | changes


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    """An engine that writes below `tmp_path`."""
    live = live_engine(
        LiveSetup(model=MODEL, engine={}, directory=str(tmp_path), flush_seconds=3600, minimum_tokens=1, shared=False),
        FakeObserver(),
    )
    yield FakeEngine(live)
    live.close()


def client_of(engine: FakeEngine, settings: ObserveSettings, model: ServedModel | str) -> TestClient:
    """An app like vLLM's, with an API key."""
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    app.include_router(router)
    init_exception_handler(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    link = EngineLink(engine, settings)
    asyncio.run(link.refresh())
    app.state.reap_link, app.state.reap_model = link, model
    return TestClient(app, headers=KEY, raise_server_exceptions=False)


@pytest.fixture
def client(engine: FakeEngine, tmp_path: Path) -> TestClient:
    """The app of a server that observes into `tmp_path`."""
    limits = RoutingLimits(num_experts=E, top_k=3, num_groups=1, top_k_groups=1, moe_layers=(0,))
    return client_of(engine, ObserveSettings(directory=str(tmp_path)), ServedModel(tmp_path, MODEL, limits, NAMES))


ROUTES = [
    ("GET", "status"),
    ("GET", "stats"),
    ("POST", "start"),
    ("POST", "stop"),
    ("POST", "reset"),
    ("POST", "flush"),
    ("GET", "mask"),
    ("PUT", "mask"),
    ("DELETE", "mask"),
    ("DELETE", "mask/name"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_wants_the_key(client: TestClient, engine: FakeEngine, method: str, path: str) -> None:
    calls = len(engine.calls)
    for key in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        assert client.request(method, f"/v1/reap/{path}", headers=key).status_code == 401
    assert len(engine.calls) == calls


def test_the_routes_above_are_all(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert found == {
        ("GET", "/v1/reap/status"),
        ("GET", "/v1/reap/stats"),
        ("POST", "/v1/reap/{action}"),
        ("GET", "/v1/reap/mask"),
        ("PUT", "/v1/reap/mask"),
        ("DELETE", "/v1/reap/mask"),
        ("DELETE", "/v1/reap/mask/{name}"),
    }


def test_recording_is_switched_and_written(client: TestClient, engine: FakeEngine, tmp_path: Path) -> None:
    assert client.post("/v1/reap/stop").json()["recording"] is False
    assert client.post("/v1/reap/start").json()["recording"] is True
    engine.live.recorder.record(50)  # type: ignore[attr-defined]
    status = client.post("/v1/reap/flush").json()
    assert status["writer"]["files_written"] == 1
    assert status["writer"]["tokens_written"] == 50
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    stats = client.get("/v1/reap/stats").json()
    assert stats["slices"] == {"default": 50}
    assert stats["layers"][0] == {
        "layer": 0,
        "routed_tokens": 150,
        "num_experts": E,
        "unseen": E - 3,
        "load_balance": pytest.approx(0.25),
    }
    assert client.post("/v1/reap/reset").status_code == 200
    assert client.get("/v1/reap/stats").json()["slices"] == {}


def test_flush_without_a_directory_is_a_conflict(engine: FakeEngine) -> None:
    response = client_of(engine, ObserveSettings(), "unknown").post("/v1/reap/flush")
    assert response.status_code == 409
    assert "directory" in response.json()["error"]["message"]


def test_plans_are_loaded_chosen_and_forgotten(client: TestClient) -> None:
    loaded = client.put("/v1/reap/mask", json={"name": "half", "plan": plan_body(), "activate": False}).json()
    assert loaded["default"] is None
    assert loaded["plans"]["half"]["experts_kept"] == len(KEPT)
    assert loaded["plans"]["half"]["bound"] is False
    assert client.put("/v1/reap/mask", json={"name": "half"}).json()["default"] == "half"
    assert client.get("/v1/reap/status").json()["mask"]["default"] == "half"
    link = client.app.state.reap_link  # type: ignore[attr-defined]
    assert link.resolve(None) == link.resolve("half") == loaded["plans"]["half"]["id"]
    assert link.resolve("base") is None
    cleared = client.delete("/v1/reap/mask").json()
    assert (cleared["default"], list(cleared["plans"])) == (None, ["half"])
    assert client.delete("/v1/reap/mask/half").json()["plans"] == {}
    with pytest.raises(KeyError):
        link.resolve("half")


def test_a_criterion_that_json_cannot_carry_is_shown_as_an_escape(client: TestClient) -> None:
    body = b'{"name": "p", "plan": ' + json.dumps(plan_body(criterion="a\ud800b")).encode() + b"}"
    loaded = client.put("/v1/reap/mask", content=body, headers={"content-type": "application/json"})
    assert loaded.json()["plans"]["p"]["criterion"] == "a\\ud800b"
    assert client.get("/v1/reap/status").status_code == 200


def test_a_bound_plan_of_another_model_is_refused(client: TestClient) -> None:
    other = MODEL.model_copy(update={"weights_sha256": "x" * 64}).model_dump()
    response = client.put("/v1/reap/mask", json={"name": "p", "plan": plan_body(model=other)})
    assert response.status_code == 400
    assert "different models" in response.json()["error"]["message"]
    mine = client.put("/v1/reap/mask", json={"name": "p", "plan": plan_body(model=MODEL.model_dump())})
    assert mine.json()["plans"]["p"]["bound"] is True


HOSTILE: list[tuple[Any, int]] = [
    (None, 400),
    ([], 400),
    ("text", 400),
    ({}, 400),
    ({"name": "p"}, 404),
    ({"name": "base"}, 400),
    ({"name": "p", "activate": False}, 400),
    ({"name": "../../etc/passwd", "plan": plan_body()}, 400),
    ({"name": "a\nb", "plan": plan_body()}, 400),
    ({"name": "x" * 65, "plan": plan_body()}, 400),
    ({"name": "p", "plan": plan_body(), "directory": "/etc"}, 400),
    ({"name": "p", "plan": plan_body() | {"path": "/etc/passwd"}}, 400),
    ({"name": "p", "plan": "/etc/passwd"}, 400),
    ({"name": "p", "plan": {}}, 400),
    ({"name": "p", "plan": plan_body([0, 1])}, 400),
    ({"name": "p", "plan": plan_body([])}, 400),
    ({"name": "p", "plan": plan_body([3, 2, 1])}, 400),
    ({"name": "p", "plan": plan_body([0, 1, 10**30])}, 400),
    ({"name": "p", "plan": plan_body([-1, 0, 1])}, 400),
    ({"name": "p", "plan": plan_body(layers=[])}, 400),
    ({"name": "p", "plan": plan_body(layers=[plan_body()["layers"][0] | {"index": 7}])}, 400),
    ({"name": "p", "plan": plan_body(schema_version=2)}, 400),
    ({"name": {"$ne": 1}, "plan": None}, 400),
]


@pytest.mark.parametrize(("body", "code"), HOSTILE, ids=[str(number) for number in range(len(HOSTILE))])
def test_hostile_bodies_are_refused_in_openais_shape(client: TestClient, body: Any, code: int) -> None:
    response = client.put("/v1/reap/mask", json=body)
    assert response.status_code == code
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert client.get("/v1/reap/mask").json() == {"refusal": None, "plans": {}, "default": None}


def plain_client() -> TestClient:
    """The routes in an app that handles no error."""
    app = FastAPI()
    app.include_router(router)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("method", "path", "content", "code", "param"),
    [
        ("PUT", "mask", b"\xff\xfe", 400, None),
        ("PUT", "mask", b"{", 400, None),
        ("PUT", "mask", b"[" * 100_000, 400, None),
        ("PUT", "mask", b'{"name": "p", "plan": ' + b"[" * 100_000, 400, None),
        ("PUT", "mask", b'{"name": "p", "plan": ' + b"[" * 900 + b"]" * 900 + b"}", 400, None),
        ("PUT", "mask", b'{"name": "p", "plan": ' + b"[" * 19 + b"]" * 19 + b"}", 400, "plan"),
        ("PUT", "mask", b" " * ((16 << 20) + 1), 413, None),
        ("PUT", "mask", b"", 400, None),
        ("PUT", "mask", b'{"name": NaN}', 400, "name"),
        ("PUT", "mask", b'{"name": "p", "plan": {"schema_version": Infinity}}', 400, "plan"),
        ("PUT", "mask", b'{"name": "p", "activate": []}', 400, "activate"),
        ("PUT", "mask", b'{"name": "p", "\\ud800": 1}', 400, None),
        ("POST", "start", b'{"directory": "/etc"}', 400, None),
        ("POST", "dump", b"", 400, "action"),
        ("DELETE", "mask/a%0Ab", b"", 400, "name"),
        ("DELETE", "mask/unknown", b"", 404, None),
        ("GET", "nothing", b"", 405, None),
        ("GET", "nothing/at/all", b"", 404, None),
        ("GET", "", b"", 404, None),
        ("PATCH", "status", b"", 405, None),
        ("BREW", "mask", b"", 405, None),
    ],
)
@pytest.mark.parametrize("around", ["vllm", "nothing"])
def test_every_error_has_openais_shape(
    client: TestClient, around: str, method: str, path: str, content: bytes, code: int, param: str | None
) -> None:
    """With vLLM's handlers around the routes, and without."""
    if around == "nothing":
        state, client = client.app.state, plain_client()  # type: ignore[attr-defined]
        client.app.state.reap_link, client.app.state.reap_model = state.reap_link, state.reap_model  # type: ignore[attr-defined]
    response = client.request(method, f"/v1/reap/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == code, response.text
    document = response.json()
    assert set(document) == {"error"}
    error = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert error["message"].isprintable()
    if code == 405:
        assert response.headers["allow"]


def test_an_engine_that_cannot_mask_says_why(tmp_path: Path) -> None:
    limits = RoutingLimits(num_experts=E, top_k=3, num_groups=1, top_k_groups=1, moe_layers=(0,))
    engine = FakeEngine(live_engine(mask_refusal="graphs are replayed"))
    client = client_of(engine, ObserveSettings(), ServedModel(tmp_path, MODEL, limits, NAMES))
    response = client.put("/v1/reap/mask", json={"name": "p", "plan": plan_body()})
    assert (response.status_code, response.json()["error"]["message"]) == (409, "graphs are replayed")


def test_without_the_models_files_no_plan_is_taken(engine: FakeEngine) -> None:
    client = client_of(engine, ObserveSettings(), "the family is unknown")
    response = client.put("/v1/reap/mask", json={"name": "p", "plan": plan_body()})
    assert (response.status_code, response.json()["error"]["message"]) == (409, "the family is unknown")


def test_without_observation_the_routes_say_so() -> None:
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    app.include_router(router)
    init_exception_handler(app)
    response = TestClient(app).get("/v1/reap/status")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == 503
