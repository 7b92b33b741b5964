"""A captured exchange as an OpenAI Batch line; a streamed answer is put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic_core import from_json

from reap_serve.records import JsonValue
from reap_serve.slice_name import is_slice_name
from reap_serve.traffic.answers.stream import BrokenStreamError, assembled, events_of
from reap_serve.traffic.body import SESSION_KEY, SLICE_KEY, TIMESTAMP_KEY, Object, is_list


class CaptureError(Exception):
    """An exchange that cannot be written; the message quotes nothing of it."""


def captured_line(
    path: str,
    arrived: float,
    request: bytes,
    response: bytes,
    *,
    streamed: bool,
    allowed_fields: frozenset[str],
) -> dict[str, JsonValue]:
    """The Batch line of an exchange.

    Args:
        path: Path of the endpoint.
        arrived: Time of arrival, seconds since 1970; becomes `body.metadata.reap_timestamp`.
        request: Body of the request.
        response: Body of the response.
        streamed: Whether the response is a stream of server-sent events.
        allowed_fields: Body fields that are kept. The slice and the session that the client gave are kept besides.

    Raises:
        CaptureError: A body is not JSON, the stream broke off, or there is no answer.
    """
    body = _object(request, "request")
    answer = _assembled(response) if streamed else _object(response, "response")
    choice = next((item for item in _objects(answer.get("choices")) if item.get("index", 0) == 0), None)
    if choice is None:
        raise CaptureError("response without a choice")
    kept = {key: value for key, value in body.items() if key in allowed_fields}
    kept["metadata"] = {**_ours(body), TIMESTAMP_KEY: repr(arrived)}
    found = {key: choice[key] for key in ("index", "message", "text", "finish_reason") if choice.get(key) is not None}
    response_body: dict[str, JsonValue] = {"choices": [found]}
    if isinstance(usage := answer.get("usage"), Mapping):
        response_body["usage"] = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
    response_id = answer.get("id")
    return {
        "custom_id": response_id if isinstance(response_id, str) else repr(arrived),
        "method": "POST",
        "url": "/v1/chat/completions" if path.endswith("/chat/completions") else "/v1/completions",
        "body": kept,
        "response": {"status_code": 200, "body": response_body},
    }


def _ours(body: Object) -> dict[str, JsonValue]:
    """Slice and session, from the body's metadata or from vLLM's extra arguments."""
    found: dict[str, JsonValue] = {}
    for source in (body.get("vllm_xargs"), body.get("metadata")):
        if isinstance(source, Mapping):
            found |= {SLICE_KEY: source[SLICE_KEY]} if is_slice_name(source.get(SLICE_KEY)) else {}
            found |= {SESSION_KEY: source[SESSION_KEY]} if isinstance(source.get(SESSION_KEY), str) else {}
    return found


def _object(content: bytes, what: str) -> Object:
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError:
        raise CaptureError(f"{what} is not JSON") from None
    if not isinstance(value, Mapping):
        raise CaptureError(f"{what} is not a JSON object")
    return value


def _objects(value: JsonValue) -> Iterator[Object]:
    for item in value if is_list(value) else ():
        if isinstance(item, Mapping):
            yield item


def _assembled(stream: bytes) -> Object:
    """The response that a stream of `data:` events stands for.

    Raises:
        CaptureError: An event is not JSON or an error, or a piece of the stream is missing.
    """
    try:
        return assembled(events_of(stream.decode()), marked=True)
    except UnicodeDecodeError:
        raise CaptureError("stream is not UTF-8") from None
    except BrokenStreamError as error:
        raise CaptureError(str(error)) from None
