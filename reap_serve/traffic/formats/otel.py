"""OpenTelemetry GenAI spans: OTLP JSON as the collector's file exporter writes it, or one exported span a line.

Content stands in `gen_ai.input.messages` and `gen_ai.output.messages`, as structured values or as JSON text, on the
span, on one of its events, or on a log record (the semantic conventions allow all three); older instrumentations
wrote `gen_ai.prompt.<i>.*` and `gen_ai.completion.<i>.*`. It is recorded only where the operator opted in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import LENGTH_LIMIT, SLICE_KEY, is_list
from reap_serve.traffic.fields import clock_time, seconds, slice_of
from reap_serve.traffic.formats.call import body_of_input, decoded, request_of_call
from reap_serve.traffic.formats.otel_messages import chat_messages, chat_tools, indexed_messages
from reap_serve.traffic.formats.otel_values import Attributes, attributes_of
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.rows import Row

_OPERATIONS = frozenset({"chat", "generate_content", "text_completion"})
_BATCHES = (("resourceSpans", "scopeSpans", "spans"), ("resourceLogs", "scopeLogs", "logRecords"))


def parse(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """The model calls in a batch of spans, or in one span; other spans are no requests.

    Raises:
        MalformedRecordError: A span of a model call is not sound.
    """
    for span in _spans(row):
        attributes = attributes_of(span.get("attributes"))
        events = span.get("events")
        for event in events if is_list(events) else ():
            if isinstance(event, Mapping):
                attributes = attributes_of(event.get("attributes")) | attributes
        if _is_model_call(attributes):
            yield _request(span, attributes, origin, slice_name)


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


def _is_model_call(attributes: Attributes) -> bool:
    operation = attributes.get("gen_ai.operation.name")
    if operation is not None:
        return isinstance(operation, str) and operation in _OPERATIONS
    return any(key.startswith(("gen_ai.usage.", "gen_ai.prompt.", "gen_ai.input.messages")) for key in attributes)


def _request(span: Row, attributes: Attributes, origin: Origin, slice_name: str) -> Request:
    messages = decoded(attributes.get("gen_ai.input.messages"))
    output = decoded(attributes.get("gen_ai.output.messages"))
    given = chat_messages(messages) if messages else indexed_messages(attributes, "gen_ai.prompt")
    answered = chat_messages(output) if output else indexed_messages(attributes, "gen_ai.completion")
    instructions = decoded(attributes.get("gen_ai.system_instructions"))
    if given and instructions:
        given = [*chat_messages([{"role": "system", "parts": instructions}]), *given]
    context = span.get("context")
    span_id = span.get("spanId", context.get("span_id") if isinstance(context, Mapping) else None)
    body = None
    if given:
        is_text = attributes.get("gen_ai.operation.name") == "text_completion" and len(given) == 1
        asked = given[0].get("content") if is_text else given
        body = body_of_input(asked, _parameters(attributes), attributes.get("gen_ai.request.model"))
    return request_of_call(
        body,
        answered[0] if answered else None,
        origin,
        slice=slice_of(attributes.get(SLICE_KEY)) or slice_name,
        timestamp=_start(span),
        session=attributes.get("gen_ai.conversation.id", attributes.get("session.id")),
        request_id=attributes.get("gen_ai.request.id", span_id),
        prompt_tokens=attributes.get("gen_ai.usage.input_tokens", attributes.get("gen_ai.usage.prompt_tokens")),
        output_tokens=attributes.get("gen_ai.usage.output_tokens", attributes.get("gen_ai.usage.completion_tokens")),
        truncated=_is_truncated(attributes, output),
    )


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


def _parameters(attributes: Attributes) -> dict[str, JsonValue]:
    found = {ours: attributes[theirs] for theirs, ours in _PARAMETERS.items() if theirs in attributes}
    tools = decoded(attributes.get("gen_ai.tool.definitions"))
    if tools:
        found["tools"] = chat_tools(tools)
    return found


def _is_truncated(attributes: Attributes, output: JsonValue) -> bool:
    """Whether the first answer ended at its length limit, as the span or the message itself says."""
    reasons = decoded(attributes.get("gen_ai.response.finish_reasons"))
    if is_list(reasons) and reasons:
        return reasons[0] == LENGTH_LIMIT
    first = output[0] if is_list(output) and output else None
    return isinstance(first, Mapping) and first.get("finish_reason") == LENGTH_LIMIT


def _start(span: Row) -> float | None:
    """Start of a span: `startTimeUnixNano` in OTLP, `start_time` in the exports of the SDKs, the time of a record."""
    nanoseconds = span.get("startTimeUnixNano", span.get("timeUnixNano"))
    if nanoseconds is not None:
        return seconds(nanoseconds, per_second=1e9)
    return clock_time(span.get("start_time", span.get("startTime")))


def _recognises(row: Row) -> bool:
    if "resourceSpans" in row or "resourceLogs" in row:
        return True
    attributes = row.get("attributes")
    return isinstance(attributes, Mapping) or (is_list(attributes) and ("spanId" in row or "traceId" in row))


OTEL = Format(
    name="otel",
    has_text=True,
    recognises=_recognises,
    parse=parse,
    specification="https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-spans.md",
)
