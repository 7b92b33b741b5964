"""OpenAI Batch lines, and plain request bodies a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import (
    SESSION_KEY,
    SLICE_KEY,
    TIMESTAMP_KEY,
    Object,
    answer_of_response,
    check_body,
    is_truncated,
    kind_of_body,
    kind_of_endpoint,
    split_answer,
    take_metadata,
)
from reap_serve.traffic.fields import count, name, seconds
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Kind, Origin, Request
from reap_serve.traffic.rows import Row


def parse_batch(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A line of a batch input, joined with its output where `response` is present.

    The recorded answer is `response.body.choices[0].message` of a response with status 200; without one it is a final
    assistant message of the body.

    Raises:
        MalformedRecordError: The line holds no chat or completion.
    """
    body = row.get("body")
    if body is None and "response" in row:
        raise MalformedRecordError("output of a batch without its input")
    if not isinstance(body, Mapping):
        raise MalformedRecordError("body is not an object")
    if row.get("method") not in (None, "POST"):
        raise MalformedRecordError("method is not POST")
    url = row.get("url")
    if url is not None and not isinstance(url, str):
        raise MalformedRecordError("url is not text")
    kind = kind_of_body(body) if url is None else kind_of_endpoint(url)
    response = _response_body(row.get("response"))
    answer = None if response is None else answer_of_response(response, kind)
    yield request_of_body(body, kind, origin, slice_name, answer, name(row.get("custom_id")), response)


def parse_body(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A line that is the body of a request; a final assistant message is its answer.

    Raises:
        MalformedRecordError: The line is no chat or completion.
    """
    yield request_of_body(row, kind_of_body(row), origin, slice_name, None, None, None)


def request_of_body(
    body: Object,
    kind: Kind,
    origin: Origin,
    slice_name: str,
    answer: Object | None,
    request_id: str | None,
    response: Object | None,
) -> Request:
    """The request in a recorded body.

    Args:
        body: OpenAI body; its `metadata.reap_*` keys say slice, time and session.
        kind: What it is.
        origin: Where it was read.
        slice_name: Slice of its file, for a body that names none.
        answer: Recorded answer apart from the body, if any.
        request_id: Its name; None gives the line number.
        response: Body of the recorded response, for its token usage and the reason of its end.

    Raises:
        MalformedRecordError: The body is not sound.
    """
    body, ours = take_metadata(body)
    body, answer = split_answer(check_body(body, kind), answer, kind)
    usage = None if response is None else response.get("usage")
    if not isinstance(usage, Mapping):
        usage = {}
    return Request(
        body=body,
        kind=kind,
        slice=name(ours.get(SLICE_KEY)) or slice_name,
        origin=origin,
        answer=answer,
        truncated=answer is not None and is_truncated(response),
        timestamp=seconds(ours.get(TIMESTAMP_KEY)),
        session=name(ours.get(SESSION_KEY)),
        id=request_id or str(origin.line),
        prompt_tokens=count(usage.get("prompt_tokens")),
        output_tokens=count(usage.get("completion_tokens")),
    )


def _response_body(response: JsonValue) -> Object | None:
    """Body of a response that succeeded; None for a request that failed or was not answered."""
    if response is None:
        return None
    if not isinstance(response, Mapping):
        raise MalformedRecordError("response is not an object")
    if response.get("status_code", 200) != 200:
        return None
    body = response.get("body")
    if body is not None and not isinstance(body, Mapping):
        raise MalformedRecordError("body of the response is not an object")
    return body


OPENAI_BATCH = Format(
    name="openai-batch",
    has_text=True,
    recognises=lambda row: (
        isinstance(row.get("body"), Mapping) or ("custom_id" in row and ("url" in row or "response" in row))
    ),
    parse=parse_batch,
    specification="https://platform.openai.com/docs/api-reference/batch/request-input",
)

REQUESTS = Format(
    name="requests",
    has_text=True,
    recognises=lambda row: "messages" in row or "prompt" in row,
    parse=parse_body,
    specification="https://platform.openai.com/docs/api-reference/chat/create",
)
