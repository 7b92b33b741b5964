"""Requests that the base refuses: named with their place, or counted and left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from stub_endpoint import StubEndpoint, bigram_model

from reap_serve.compare.endpoint import ScoringEndpoint
from reap_serve.compare.measure import CompareSettings, prepare
from reap_serve.compare.side import Side
from reap_serve.errors import TrafficError
from reap_serve.traffic.refusal import Refusals, RefusedRecordError
from reap_serve.traffic.request import Origin, Request


def asked(line: int, **body: object) -> Request:
    kind = "chat" if "messages" in body else "completion"
    return Request(body, kind, "s", Origin("t.jsonl", "requests", line))  # type: ignore[arg-type]


def chat(line: int, *roles: str) -> Request:
    return asked(line, messages=[{"role": role, "content": "hello"} for role in roles])


class Endpoint:
    """Takes alternating roles and tokens below 128."""

    max_model_len = 4096

    def render_chat(self, body: dict[str, list[dict[str, str]]], answer: dict[str, str] | None) -> list[int]:
        roles = [message["role"] for message in body["messages"]]
        if len(roles) != len(set(roles)):
            raise RefusedRecordError("Conversation roles must alternate")
        return [1, 2, 3] if answer is None else [1, 2, 3, ord(answer["content"]), 9]

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return list(map(ord, text))

    def require_taken(self, token_ids: list[int]) -> None:
        if max(token_ids) > 128:
            raise RefusedRecordError(f"Token id {max(token_ids)} is out of vocabulary")


REQUESTS = [
    chat(1, "user"),
    chat(2, "user", "user"),
    asked(3, prompt=[5, 6]),
    asked(4, prompt=[5, 999]),
    asked(5, prompt=""),
    chat(6, "user"),
]
SIDE = cast(Side, SimpleNamespace(endpoint=Endpoint()))


def test_they_are_counted_and_the_others_compared() -> None:
    settings = CompareSettings(refusals=Refusals(skip=True))
    cases = prepare(SIDE, REQUESTS, settings)
    assert [request.line for request in cases.fitting] == [1, 3, 6]
    assert cases.too_long == 0
    assert settings.refusals.malformed.counts == {
        "refused by the engine: Conversation roles must alternate": 1,
        "refused by the engine: Token id N is out of vocabulary": 1,
        "refused by the engine: the prompt is empty": 1,
    }


@pytest.mark.parametrize("line", [2, 4, 5])
def test_the_first_stops_with_its_place(line: int) -> None:
    with pytest.raises(TrafficError, match=rf"t\.jsonl:{line}: refused by the engine: "):
        prepare(SIDE, [REQUESTS[0], REQUESTS[line - 1]], CompareSettings())


def test_an_endpoint_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with StubEndpoint(bigram_model(1)) as stub, ScoringEndpoint(stub.url) as endpoint:
        reply = httpx.Response(400, json={"error": {"message": "At most 0 image(s) may be provided"}})
        monkeypatch.setattr(endpoint, "_send", lambda method, path, body: reply)
        for call in (
            lambda: endpoint.render_chat({"messages": [{"role": "user", "content": "a"}]}, None),
            lambda: endpoint.tokenize("a", special=False),
            lambda: endpoint.require_taken([1]),
        ):
            with pytest.raises(RefusedRecordError, match=r"At most 0 image"):
                call()
