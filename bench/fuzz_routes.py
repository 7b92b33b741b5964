"""Damaged requests to the routes under /v1/reap, with an engine behind them that only answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from fuzz_inputs import Inputs
from fuzz_mutations import HOSTILE_TEXTS, document_bytes, mutated_bytes, mutated_document
from fuzz_targets import Case

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD")
PATHS = ("status", "stats", "start", "stop", "reset", "flush", "mask", "mask/half", "nothing")
ERROR_KEYS = {"message", "type", "param", "code"}


class StubEngine:
    """An engine of one rank that keeps the names of its plans and nothing else."""

    def __init__(self) -> None:
        self.plans: dict[str, Any] = {}
        self.default: str | None = None

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: None = None
    ) -> Sequence[object]:
        """What the worker extension answers."""
        if method == "reap_load_plan":
            self.plans[args[0]] = args[1]
        elif method == "reap_set_default":
            self.default = args[0]
        elif method == "reap_forget_plan":
            self.plans.pop(args[0], None)
        elif method == "reap_flush":
            return [True]
        elif method in ("reap_status", "reap_tick"):
            return [self._status()]
        return [None]

    async def wake(self) -> None:
        """It holds nothing that a forward pass would measure."""

    def _status(self) -> dict[str, Any]:
        if len(self.plans) > 8:
            self.plans.clear()
        return {
            "recording": True,
            "recorder": "deferred",
            "complete": True,
            "failures": 0,
            "tokens_observed": 1,
            "tokens_masked": 0,
            "sample_fraction": 1.0,
            "overhead_budget": None,
            "held_bytes": 0,
            "recorder_seconds": 0.1,
            "busy_seconds": 1.0,
            "slices": {"default": 1},
            "slice_limits": {"max_slices": 16, "known": ["default"], "allowed": [], "beyond": {}},
            "layers": [],
            "weights_bytes": 1,
            "writer": None,
            "mask": {"refusal": None, "plans": self.plans, "default": self.default},
            "gate_mass": {"pruned": False, "refusal": None, "served": {}, "plans": {}},
        }


@cache
def _client(model: str) -> Any:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from reap_serve.record.settings import ObserveSettings
    from reap_serve.serve.link import EngineLink
    from reap_serve.serve.plan_check import served_model
    from reap_serve.serve.routes import router

    app = FastAPI()
    app.include_router(router)
    link = EngineLink(StubEngine(), ObserveSettings(directory="statistics"))
    asyncio.run(link.refresh())
    app.state.reap_link, app.state.reap_model = link, served_model(model)
    return TestClient(app, raise_server_exceptions=False)


def run_routes(case: Case, inputs: Inputs, random_: random.Random) -> None:
    """A few damaged requests; each answer is below 500, and an error is one of OpenAI's shape."""
    client = _client(str(inputs.model))
    for _ in range(3):
        method, path = random_.choice(METHODS), random_.choice(PATHS)
        content, headers = b"", {"content-type": "application/json"}
        if random_.random() < 0.75:
            method, path = "PUT", "mask"
            plan = json.loads(inputs.plan)
            choice: Any = {"name": "half", "plan": plan, "activate": random_.random() < 0.5}
            try:
                content = document_bytes(mutated_document(choice, random_), random_)
            except RecursionError:
                # A damage that cannot be written down.
                continue
        if random_.random() < 0.1:
            content = mutated_bytes(content or b'{"name": "half"}', random_)
        if random_.random() < 0.1:
            path = f"mask/{random_.choice(HOSTILE_TEXTS)}".encode("utf-8", "replace").decode().replace("\x00", "%00")
        if random_.random() < 0.05:
            headers = {"content-type": random_.choice(("text/plain", "application/x-www-form-urlencoded", ""))}
        try:
            answer = client.request(method, f"/v1/reap/{path}", content=content, headers=headers)
        except Exception as error:
            if type(error).__name__ not in ("InvalidURL", "UnicodeEncodeError", "LocalProtocolError"):
                raise
            continue
        case.findings += [f"{method} {path} {content[:200]!r}: {finding}" for finding in _judged(method, answer)]


def _judged(method: str, answer: Any) -> list[str]:
    if answer.status_code >= 500:
        return [f"HTTP {answer.status_code}: {answer.text[:300]}"]
    if method == "HEAD" or answer.is_redirect:
        return []
    try:
        document = answer.json()
    except ValueError:
        return [f"HTTP {answer.status_code} without JSON: {answer.text[:200]!r}"]
    if answer.status_code < 400:
        return []
    error = document.get("error") if isinstance(document, dict) else None
    if set(document) != {"error"} or not isinstance(error, dict) or set(error) != ERROR_KEYS:
        return [f"HTTP {answer.status_code} in another shape: {answer.text[:300]}"]
    return [] if error["code"] == answer.status_code else [f"the code of {answer.text[:200]}"]
