"""LiteLLM's StandardLoggingPayload, as its S3, GCS and custom callbacks write it, one a line."""

from __future__ import annotations

from collections.abc import Iterator

from reap_serve.records import JsonValue
from reap_serve.traffic.body import SLICE_KEY, is_list
from reap_serve.traffic.fields import clock_time, slice_of
from reap_serve.traffic.formats.call import body_of_input, request_of_call
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.json_text import as_object, decoded
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.rows import Row

_TEXT_TYPES = frozenset({"text_completion", "atext_completion"})
_CALL_TYPES = _TEXT_TYPES | {"completion", "acompletion", "responses", "aresponses", "anthropic_messages"}
# What LiteLLM writes for a message when `turn_off_message_logging` is on.
_REDACTED = "redacted-by-litellm"


def parse(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A payload: `messages`, `response`, `model_parameters`, `startTime` in s; `trace_id` groups a session.

    The slice stands in the metadata that the caller sent (`metadata.requester_metadata.reap_slice`). A redacted
    payload, or one of a proxy that logs no messages, has lengths only. A call that failed has no answer.

    Raises:
        MalformedRecordError: The payload is of another kind of call, or not sound.
    """
    call_type = row.get("call_type", "completion")
    if not isinstance(call_type, str) or call_type not in _CALL_TYPES:
        raise MalformedRecordError("call_type is neither chat nor completion")
    messages = row.get("messages")
    if not decoded(messages):
        # The proxy's own table keeps the request instead.
        messages = _sent_body(row)
    body = None
    if messages and not _is_redacted(decoded(messages)):
        is_text = call_type in _TEXT_TYPES
        given = _prompt_of(messages) if is_text else messages
        if call_type.endswith("responses"):
            found = decoded(given)
            given = [{"role": "user", "content": found}] if isinstance(found, str) else found
        body = body_of_input(given, as_object(row.get("model_parameters")), row.get("model"), is_text=is_text)
    metadata = as_object(row.get("metadata"))
    sent = as_object(metadata.get("requester_metadata"))
    yield request_of_call(
        body,
        None if row.get("status") == "failure" else row.get("response"),
        origin,
        slice=slice_of(sent.get(SLICE_KEY, metadata.get(SLICE_KEY))) or slice_name,
        timestamp=clock_time(row.get("startTime")),
        session=row.get("trace_id"),
        request_id=row.get("id"),
        prompt_tokens=row.get("prompt_tokens"),
        output_tokens=row.get("completion_tokens"),
    )


def _is_redacted(messages: JsonValue) -> bool:
    if isinstance(messages, str):
        return messages == _REDACTED
    return is_list(messages) and all(as_object(message).get("content") == _REDACTED for message in messages)


def _sent_body(row: Row) -> JsonValue:
    sent = as_object(row.get("proxy_server_request"))
    body = as_object(sent.get("body")) or sent
    return body if any(body.get(key) for key in ("messages", "prompt", "input")) else None


def _prompt_of(messages: JsonValue) -> JsonValue:
    """The prompt of a text completion, which LiteLLM logs as one user message or as it is."""
    given = decoded(messages)
    if is_list(given) and len(given) == 1:
        return as_object(given[0]).get("content", given[0])
    return messages


LITELLM = Format(
    name="litellm",
    has_text=True,
    recognises=lambda row: "call_type" in row or ("startTime" in row and "model_parameters" in row),
    parse=parse,
    specification="https://docs.litellm.ai/docs/proxy/logging_spec",
)
