"""OpenAI Batch lines, and plain request bodies a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.answers.answer import NO_ANSWER, Answered, answered, answered_output
from reap_serve.traffic.body import (
    SESSION_KEY,
    SLICE_KEY,
    TIMESTAMP_KEY,
    Object,
    check_body,
    is_list,
    is_responses_body,
    kind_of_body,
    kind_of_endpoint,
    split_answer,
    take_metadata,
)
from reap_serve.traffic.chats.bodies import chat_body, completion_body
from reap_serve.traffic.echo import without_echo
from reap_serve.traffic.fields import name, seconds
from reap_serve.traffic.formats.pairs import SUCCESS, pair_of
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Kind, Origin, Request
from reap_serve.traffic.rows import Row
from reap_serve.traffic.usage import usage_tokens

# Where a log of requests puts the answer beside the body.
_ANSWER_KEYS = ("response", "completion", "answer", "output")
# What a response says beside its choices.
_RESPONSE_KEYS = frozenset({"choices", "usage", "id", "object", "created", "system_fingerprint", "service_tier"})


def parse_batch(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A line of a batch input, joined with its output where `response` is present.

    The recorded answer is the choice of index 0 in a response with a status of 200 to 299; without one it is a final
    assistant message of the body.

    Raises:
        MalformedRecordError: The line holds no chat or completion.
    """
    body = row.get("body", row.get("params"))
    if body is None and ("response" in row or "result" in row):
        raise MalformedRecordError("output of a batch without its input")
    if not isinstance(body, dict):
        raise MalformedRecordError("body is not an object")
    if row.get("method") not in (None, "POST"):
        raise MalformedRecordError("method is not POST")
    url = row.get("url")
    if url is not None and not isinstance(url, str):
        raise MalformedRecordError("url is not text")
    kind = kind_of_body(body) if url is None else kind_of_endpoint(url)
    response = _response_body(row.get("response", row.get("result")))
    recorded = NO_ANSWER if response is None else answered(response, kind)
    yield request_of_body(body, kind, origin, slice_name, recorded, name(row.get("custom_id")))


def parse_body(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A line that is the body of a request; its answer is a final assistant message, or stands beside the body.

    A line that holds a body and its response under two keys, as `pairs` knows them, is such a body, too.

    Raises:
        MalformedRecordError: The line is no chat or completion.
    """
    if (pair := pair_of(row)) is not None:
        if pair.body is not None:
            kind = kind_of_body(pair.body)
            recorded = NO_ANSWER if pair.response is None else answered_output(pair.response, kind)
            yield request_of_body(pair.body, kind, origin, slice_name, recorded, None)
        return
    kind = kind_of_body(row)
    recorded, taken = NO_ANSWER, frozenset[str]()
    found = next((key for key in _ANSWER_KEYS if row.get(key) is not None), None)
    if found is not None:
        recorded, taken = answered_output(row[found], kind), frozenset({found})
    elif isinstance(row.get("message"), dict) and "messages" in row:
        # Ollama's answer, beside the messages.
        recorded, taken = answered_output(row["message"], kind), frozenset({"message"})
    elif is_list(row.get("choices")):
        # A stored completion of OpenAI's, which holds what was asked.
        recorded, taken = answered(row, kind), _RESPONSE_KEYS
    body = {key: value for key, value in row.items() if key not in taken} if taken else row
    yield request_of_body(body, kind, origin, slice_name, recorded, None)


def request_of_body(
    body: Object, kind: Kind, origin: Origin, slice_name: str, recorded: Answered, request_id: str | None
) -> Request:
    """The request in a recorded body.

    Args:
        body: Body of an OpenAI, Responses or Anthropic request; its `metadata.reap_*` keys say slice, time, session.
        kind: What it is.
        origin: Where it was read.
        slice_name: Slice of its file, for a body that names none.
        recorded: Recorded answer apart from the body, if any.
        request_id: Its name; None gives the line number.

    Raises:
        MalformedRecordError: The body is not sound.
    """
    body, ours = take_metadata(body)
    body = check_body(chat_body(body) if kind == "chat" else completion_body(body), kind)
    body, answer = without_echo(body, recorded.message, kind)
    body, answer = split_answer(body, answer, kind)
    prompt_tokens, output_tokens = usage_tokens(recorded.usage)
    return Request(
        body=body,
        kind=kind,
        slice=name(ours.get(SLICE_KEY)) or slice_name,
        origin=origin,
        answer=answer,
        truncated=answer is not None and recorded.truncated,
        timestamp=seconds(ours.get(TIMESTAMP_KEY)),
        session=name(ours.get(SESSION_KEY)),
        id=request_id or str(origin.line),
        prompt_tokens=prompt_tokens,
        # Usage adds up all choices, of which the first is read.
        output_tokens=output_tokens if recorded.choices == 1 else None,
        choices=recorded.choices,
        broken=recorded.broken,
    )


def _response_body(response: JsonValue) -> JsonValue:
    """Body of a response that succeeded; None for a request that failed or was not answered."""
    if response is None:
        return None
    if not isinstance(response, dict):
        return response
    if not SUCCESS.match(str(response.get("status_code", 200))):
        return None
    if "body" in response:
        body = response["body"]
        if body is not None and not isinstance(body, (Mapping, str, list)):
            raise MalformedRecordError("body of the response is not an object")
        return body
    if "message" in response and "choices" not in response:
        # A result of Anthropic's batches.
        return response["message"] if response.get("type", "succeeded") == "succeeded" else None
    if response.get("type") in ("errored", "canceled", "expired"):
        return None
    return response


OPENAI_BATCH = Format(
    name="openai-batch",
    has_text=True,
    recognises=lambda row: (
        isinstance(row.get("body"), Mapping)
        or ("custom_id" in row and not row.keys().isdisjoint(("url", "response", "params", "result")))
    ),
    parse=parse_batch,
    specification="https://platform.openai.com/docs/api-reference/batch/request-input",
)

REQUESTS = Format(
    name="requests",
    has_text=True,
    recognises=lambda row: "messages" in row or "prompt" in row or is_responses_body(row) or pair_of(row) is not None,
    parse=parse_body,
    specification="https://platform.openai.com/docs/api-reference/chat/create",
)
