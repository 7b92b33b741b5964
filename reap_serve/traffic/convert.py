"""Requests as OpenAI Batch lines, which every command here and `vllm run-batch` read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import BinaryIO

from reap_serve.errors import TrafficError
from reap_serve.records import JsonValue
from reap_serve.traffic.body import LENGTH_LIMIT, SESSION_KEY, SLICE_KEY, TIMESTAMP_KEY, as_metadata
from reap_serve.traffic.request import DEFAULT_SLICE, Request

_URLS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


def batch_line(request: Request, *, model: str | None = None) -> dict[str, JsonValue]:
    """The Batch line of a request, joined with its recorded answer.

    Slice, time and session stand in `body.metadata` as `reap_slice`, `reap_timestamp` (seconds) and `reap_session`:
    text, as the API wants it. Reading the line gives the request again.

    Args:
        request: A request with text.
        model: Name of the model; None keeps the recorded one.

    Raises:
        TrafficError: The request has no text.
    """
    if request.body is None:
        raise TrafficError(
            f"{request.origin}: a request of which only lengths were recorded has no body",
            "give traffic with text",
        )
    ours: dict[str, JsonValue] = {}
    if request.slice != DEFAULT_SLICE:
        ours[SLICE_KEY] = request.slice
    if request.timestamp is not None:
        ours[TIMESTAMP_KEY] = repr(request.timestamp)
    if request.session is not None:
        ours[SESSION_KEY] = request.session
    body: dict[str, JsonValue] = {**request.body}
    if model is not None:
        body["model"] = model
    if ours:
        body["metadata"] = {**as_metadata(body.get("metadata")), **ours}
    line: dict[str, JsonValue] = {
        "custom_id": request.id or str(request.line),
        "method": "POST",
        "url": _URLS[request.kind],
        "body": body,
    }
    if request.answer is not None:
        line["response"] = {"status_code": 200, "body": _response_body(request)}
    return line


def write_batch(requests: Iterable[Request], stream: BinaryIO, *, model: str | None = None) -> int:
    """Writes Batch lines, each under an id of its own: the one it has where that is new, else a number.

    Returns:
        Number of lines.

    Raises:
        TrafficError: A request has no text.
    """
    written, taken = 0, set[str]()
    for request in requests:
        line = batch_line(request, model=model)
        written += 1
        line["custom_id"] = _new_id(str(line["custom_id"]), written, taken)
        stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    return written


def _new_id(wanted: str, number: int, taken: set[str]) -> str:
    """The id wanted, or a number from the line's own on, that no line has; it is taken then."""
    found = wanted
    while found in taken:
        found, number = str(number), number + 1
    taken.add(found)
    return found


def _response_body(request: Request) -> dict[str, JsonValue]:
    body: dict[str, JsonValue] = {"choices": [_choice(request)]}
    usage: dict[str, JsonValue] = {}
    if request.prompt_tokens is not None:
        usage["prompt_tokens"] = request.prompt_tokens
    if request.output_tokens is not None:
        usage["completion_tokens"] = request.output_tokens
    return {**body, "usage": usage} if usage else body


def _choice(request: Request) -> dict[str, JsonValue]:
    ended: dict[str, JsonValue] = {"finish_reason": LENGTH_LIMIT} if request.truncated else {}
    if request.kind == "chat":
        return {"index": 0, "message": request.answer, **ended}
    return {"index": 0, **(request.answer or {}), **ended}
