"""OpenTelemetry GenAI spans: OTLP JSON as the collector's file exporter writes it, or one exported span a line.

Content stands in `gen_ai.input.messages` and `gen_ai.output.messages`, as structured values or as JSON text, on the
span, on one of its events, or on a log record (the semantic conventions allow all three); other instrumentations
write it elsewhere (`otel_conventions`). It is recorded only where the operator opted in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from reap_serve.records import JsonValue
from reap_serve.traffic.answers.answer import NO_ANSWER, answered_output
from reap_serve.traffic.body import LENGTH_LIMIT, SLICE_KEY, Object, is_list
from reap_serve.traffic.chats.messages import chat_messages
from reap_serve.traffic.fields import clock_time, seconds, slice_of
from reap_serve.traffic.formats.call import body_of_input, request_of_call
from reap_serve.traffic.formats.otel_conventions import Call, call_of
from reap_serve.traffic.formats.otel_unread import is_foreign_call, unread_names
from reap_serve.traffic.formats.otel_values import Attributes, attributes_of, flattened
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.json_text import as_object, decoded
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Kind, Origin, Request
from reap_serve.traffic.rows import Row

_OPERATIONS = frozenset({"chat", "generate_content", "text_completion", "completion", "responses", "messages"})
_TEXT_OPERATIONS = ("text_completion", "completion")
_BATCHES = (("resourceSpans", "scopeSpans", "spans"), ("resourceLogs", "scopeLogs", "logRecords"))


def parse(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """The model calls in a batch of spans, or in one span; other spans are no requests.

    Raises:
        MalformedRecordError: A span of a model call is not sound, or its text stands in attributes that are not read.
    """
    for span in _spans(row):
        own = flattened(attributes_of(span.get("attributes")))
        events = [_plain_event(event) for event in _objects(_listed(span.get("events")), "events")]
        attributes = own
        for event in events:
            found = event["attributes"]
            if isinstance(found, Mapping):
                # Content that stands on an event instead of on the span.
                attributes = {key: item for key, item in found.items() if key.startswith("gen_ai.")} | attributes
        if _is_message_record(span, attributes):
            raise MalformedRecordError("messages that are log records of their own")
        if _is_model_call(attributes, events):
            yield _request(span, attributes, events, origin, slice_name)


def _listed(events: JsonValue) -> JsonValue:
    return events if is_list(events) else None


def _plain_event(event: Row) -> dict[str, JsonValue]:
    return {"name": event.get("name"), "attributes": attributes_of(event.get("attributes")), **_dropped_of(event)}


def _is_message_record(span: Row, attributes: Attributes) -> bool:
    """Whether a log record is one message of a call: the others are other records."""
    event = span.get("eventName", attributes.get("event.name"))
    return isinstance(event, str) and (
        event == "gen_ai.choice" or re.fullmatch(r"gen_ai\.\w+\.message", event) is not None
    )


def _spans(row: Row) -> Iterator[Row]:
    found = False
    for resources, scopes, records in _BATCHES:
        if resources in row:
            found = True
            for resource in _objects(row.get(resources), resources):
                for scope in _objects(resource.get(scopes), scopes):
                    yield from _objects(scope.get(records), records)
    if not found:
        yield row


def _objects(value: JsonValue, key: str) -> Iterator[Row]:
    if value is None:
        return
    if not is_list(value):
        raise MalformedRecordError(f"{key} is not a list")
    for item in value:
        if not isinstance(item, Mapping):
            raise MalformedRecordError(f"item of {key} is not an object")
        yield item


def _is_model_call(attributes: Attributes, events: Sequence[Object]) -> bool:
    operation = attributes.get("gen_ai.operation.name")
    if operation is not None:
        return isinstance(operation, str) and operation in _OPERATIONS
    kind = attributes.get("openinference.span.kind")
    if kind is not None:
        return kind == "LLM"
    operation = attributes.get("ai.operationId")
    if isinstance(operation, str):
        return operation.endswith((".doGenerate", ".doStream"))
    kind = attributes.get("langfuse.observation.type")
    if kind is not None:
        return kind == "generation"
    if any(key.startswith(_CALL_PREFIXES) for key in attributes):
        return True
    return is_foreign_call(attributes) or any(_is_message_event(event.get("name")) for event in events)


_CALL_PREFIXES = (
    "gen_ai.usage.",
    "gen_ai.prompt",
    "gen_ai.input.messages",
    "llm.prompts",
    "llm.input_messages",
    "llm.request.type",
)


def _is_message_event(name: JsonValue) -> bool:
    return isinstance(name, str) and name.startswith("gen_ai.") and name.endswith((".message", ".choice", ".prompt"))


def _request(span: Row, attributes: Attributes, events: Sequence[Object], origin: Origin, slice_name: str) -> Request:
    call = call_of(attributes, events)
    _require_whole(span, events)
    body, recorded = None, NO_ANSWER
    if call is not None:
        body = _body(call, attributes)
        kind: Kind = "completion" if "prompt" in body else "chat"
        if call.answers:
            recorded = answered_output(call.answers[0], kind)
            recorded = replace(
                recorded,
                choices=max(len(call.answers), recorded.choices),
                truncated=_is_truncated(attributes, call.truncated or recorded.truncated),
            )
    elif names := unread_names(attributes, events):
        raise MalformedRecordError("text in attributes of a convention that is not read", ", ".join(names))
    context = span.get("context")
    span_id = span.get("spanId", context.get("span_id") if isinstance(context, Mapping) else None)
    return request_of_call(
        body,
        recorded,
        origin,
        slice=slice_of(attributes.get(SLICE_KEY)) or slice_name,
        timestamp=_start(span),
        session=_first(attributes, "gen_ai.conversation.id", "session.id"),
        request_id=attributes.get("gen_ai.request.id", span_id),
        prompt_tokens=_first(attributes, *_PROMPT_TOKENS),
        output_tokens=_first(attributes, *_OUTPUT_TOKENS),
    )


_PROMPT_TOKENS = (
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.prompt_tokens",
    "llm.token_count.prompt",
    "ai.usage.inputTokens",
    "ai.usage.promptTokens",
    "llm.usage.prompt_tokens",
)
_OUTPUT_TOKENS = (
    "gen_ai.usage.output_tokens",
    "gen_ai.usage.completion_tokens",
    "llm.token_count.completion",
    "ai.usage.outputTokens",
    "ai.usage.completionTokens",
    "llm.usage.completion_tokens",
)
_MODELS = ("gen_ai.request.model", "llm.model_name", "ai.model.id", "llm.request.model")


def _first(attributes: Attributes, *keys: str) -> JsonValue:
    return next((attributes[key] for key in keys if attributes.get(key) is not None), None)


def _require_whole(span: Row, events: Sequence[Object]) -> None:
    """Refuses a span that says it lost something: what is left is no shorter conversation.

    Raises:
        MalformedRecordError: It does.
    """
    lost = {**_dropped_of(span)}
    for event in events:
        lost |= {f"event {key}": value for key, value in event.items() if key in _DROPPED}
    if lost:
        raise MalformedRecordError("span that dropped attributes or events", ", ".join(lost))


_DROPPED = (
    "droppedAttributesCount",
    "dropped_attributes_count",
    "droppedEventsCount",
    "dropped_events_count",
    "dropped_attributes",
    "dropped_events",
    "DroppedAttributes",
    "DroppedEvents",
)


def _dropped_of(record: Row) -> dict[str, JsonValue]:
    return {key: record[key] for key in _DROPPED if record.get(key) not in (None, 0, "0", "")}


def _body(call: Call, attributes: Attributes) -> Object:
    parameters: dict[str, JsonValue] = {**as_object(attributes.get("llm.invocation_parameters"))}
    parameters |= {ours: attributes[theirs] for theirs, ours in _PARAMETERS.items() if theirs in attributes}
    if call.tools:
        parameters["tools"] = call.tools
    operation = attributes.get("gen_ai.operation.name", attributes.get("llm.request.type"))
    given = call.messages
    if operation in _TEXT_OPERATIONS and is_list(given) and len(given) == 1 and not call.tools:
        content = chat_messages(given)[0].get("content")
        if isinstance(content, str):
            return body_of_input(content, parameters, _first(attributes, *_MODELS), is_text=True)
    is_text = isinstance(given, str) and operation in _TEXT_OPERATIONS
    return body_of_input(given, parameters, _first(attributes, *_MODELS), is_text=is_text)


_PARAMETERS = {
    "gen_ai.request.choice.count": "n",
    "gen_ai.request.frequency_penalty": "frequency_penalty",
    "gen_ai.request.max_tokens": "max_tokens",
    "gen_ai.request.presence_penalty": "presence_penalty",
    "gen_ai.request.seed": "seed",
    "gen_ai.request.stop_sequences": "stop",
    "gen_ai.request.temperature": "temperature",
    "gen_ai.request.top_k": "top_k",
    "gen_ai.request.top_p": "top_p",
}


def _is_truncated(attributes: Attributes, said: bool) -> bool:
    """Whether the first answer ended at its length limit, as the span says, else as the answer itself."""
    reasons = decoded(attributes.get("gen_ai.response.finish_reasons"))
    return reasons[0] == LENGTH_LIMIT if is_list(reasons) and reasons else said


def _start(span: Row) -> float | None:
    """Start of a span: `startTimeUnixNano` in OTLP, `start_time` in the exports of the SDKs, the time of a record."""
    nanoseconds = span.get("startTimeUnixNano", span.get("timeUnixNano"))
    if nanoseconds is not None:
        return seconds(nanoseconds, per_second=1e9)
    return clock_time(span.get("start_time", span.get("startTime")))


def _recognises(row: Row) -> bool:
    if "resourceSpans" in row or "resourceLogs" in row:
        return True
    if not row.keys().isdisjoint(("messages", "prompt", "inputs")):
        # Attributes of another log's own.
        return False
    attributes = row.get("attributes")
    return isinstance(attributes, Mapping) or (is_list(attributes) and ("spanId" in row or "traceId" in row))


OTEL = Format(
    name="otel",
    has_text=True,
    recognises=_recognises,
    parse=parse,
    specification="https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-spans.md",
)
