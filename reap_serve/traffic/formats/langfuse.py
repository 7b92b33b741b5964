"""Langfuse observations, as its blob export (`observations_v2`), its table export and its API write them.

CSV, JSON or JSONL. A trace with its observations inside, as the download button and the public API give it, stands for
the generations among them: what the trace itself calls input and output is what a visitor typed and saw, not what the
model was asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import SLICE_KEY, is_list
from reap_serve.traffic.fields import clock_time, slice_of
from reap_serve.traffic.formats.call import body_of_input, request_of_call
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.json_text import as_object, decoded, structured
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.rows import Row
from reap_serve.traffic.usage import usage_of_details

_OBSERVATION_KEYS = frozenset({"trace_id", "traceId", "start_time", "startTime"})


def parse(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """The generations in an observation, in a trace with its observations, or in a page of either.

    An observation has `input`, `output`, `start_time` (UTC) and `session_id`; keys stand in snake case in the blob
    export and in camel case elsewhere. One of the level ERROR has no answer: what stands there is an error's text.

    Raises:
        MalformedRecordError: A generation is not sound, or a trace comes without its observations.
    """
    for observation in _observations(row, {}):
        kind = observation.get("type")
        if isinstance(kind, str) and kind.upper() not in ("GENERATION", ""):
            continue
        yield _request(observation, origin, slice_name)


def _observations(row: Row, trace: Row) -> Iterator[Row]:
    page, inside = row.get("data"), row.get("observations")
    if is_list(page) and "input" not in row:
        for item in page:
            yield from _observations(_object(item), trace)
    elif is_list(inside) or isinstance(inside, str):
        own = row.get("trace", row)
        trace = own if isinstance(own, Mapping) else row
        items = structured(inside)
        for item in items if is_list(items) else ():
            if not isinstance(item, Mapping):
                raise MalformedRecordError("trace with the names of its observations alone")
            yield {**_of_trace(trace), **item}
    elif _is_trace(row):
        raise MalformedRecordError("trace without its observations")
    else:
        yield row


def _object(value: JsonValue) -> Row:
    if not isinstance(value, Mapping):
        raise MalformedRecordError("observation is not an object")
    return value


def _of_trace(trace: Row) -> Row:
    """What observations take over from their trace."""
    session = _field(trace, "session_id", "sessionId")
    slice_name = as_object(trace.get("metadata")).get(SLICE_KEY)
    found: dict[str, JsonValue] = {} if session is None else {"session_id": session}
    return found if slice_name is None else {**found, "metadata": {SLICE_KEY: slice_name}}


def _is_trace(row: Row) -> bool:
    """Whether a record is a trace's own: it has neither the type nor the keys of an observation."""
    return not row.get("type") and row.keys().isdisjoint(_OBSERVATION_KEYS)


def _request(row: Row, origin: Origin, slice_name: str) -> Request:
    given = row.get("input")
    parameters = {**as_object(_field(row, "model_parameters", "modelParameters"))}
    parameters |= {"tools": tools} if (tools := decoded(_field(row, "tool_definitions", "toolDefinitions"))) else {}
    usage = as_object(_field(row, "usage_details", "usageDetails", "usage"))
    prompt_tokens, output_tokens = usage_of_details(usage)
    return request_of_call(
        body_of_input(given, parameters, _field(row, "provided_model_name", "model")) if given else None,
        None if row.get("level") == "ERROR" else row.get("output"),
        origin,
        slice=slice_of(as_object(row.get("metadata")).get(SLICE_KEY)) or slice_name,
        timestamp=clock_time(_field(row, "start_time", "startTime")),
        session=_field(row, "session_id", "sessionId"),
        request_id=row.get("id"),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


def _field(row: Row, *keys: str) -> JsonValue:
    for key in keys:
        if row.get(key) not in (None, ""):
            return row[key]
    return None


def _recognises(row: Row) -> bool:
    if is_list(row.get("observations")) or isinstance(row.get("trace"), Mapping):
        return True
    page = row.get("data")
    if is_list(page) and ("meta" in row or "input" not in row):
        return any(isinstance(item, Mapping) and _recognises(item) for item in page)
    return (
        "input" in row
        and ("output" in row or "trace_id" in row or "traceId" in row)
        and not row.keys().isdisjoint(_OBSERVATION_KEYS | {"session_id", "sessionId", "projectId", "project_id"})
    )


LANGFUSE = Format(
    name="langfuse",
    has_text=True,
    recognises=_recognises,
    parse=parse,
    specification="https://langfuse.com/docs/api-and-data-platform/features/blob-storage-export-fields",
)
