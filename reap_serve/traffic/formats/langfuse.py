"""Langfuse observations, as its blob export (`observations_v2`) and its table export write them: CSV, JSON or JSONL."""

from __future__ import annotations

from collections.abc import Iterator

from reap_serve.records import JsonValue
from reap_serve.traffic.body import SLICE_KEY
from reap_serve.traffic.fields import clock_time, slice_of
from reap_serve.traffic.formats.call import as_object, body_of_input, decoded, request_of_call
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.rows import Row


def parse(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """An observation: `input`, `output`, `start_time` (UTC), `session_id`; nothing for one that is no generation.

    Keys stand in snake case in the blob export and in camel case in the table export.

    Raises:
        MalformedRecordError: A generation is not sound.
    """
    kind = row.get("type")
    if isinstance(kind, str) and kind.upper() not in ("GENERATION", ""):
        return
    given = decoded(row.get("input"))
    parameters = {**as_object(_field(row, "model_parameters", "modelParameters"))}
    parameters |= {"tools": tools} if (tools := decoded(row.get("tool_definitions"))) else {}
    usage = as_object(_field(row, "usage_details", "usageDetails", "usage"))
    yield request_of_call(
        body_of_input(given, parameters, _field(row, "provided_model_name", "model")) if given else None,
        row.get("output"),
        origin,
        slice=slice_of(as_object(row.get("metadata")).get(SLICE_KEY)) or slice_name,
        timestamp=clock_time(_field(row, "start_time", "startTime")),
        session=_field(row, "session_id", "sessionId"),
        request_id=row.get("id"),
        prompt_tokens=_field(usage, "input", "prompt_tokens", "promptTokens"),
        output_tokens=_field(usage, "output", "completion_tokens", "completionTokens"),
    )


def _field(row: Row, *keys: str) -> JsonValue:
    for key in keys:
        if row.get(key) not in (None, ""):
            return row[key]
    return None


LANGFUSE = Format(
    name="langfuse",
    has_text=True,
    recognises=lambda row: (
        "input" in row
        and ("output" in row or "trace_id" in row or "traceId" in row)
        and not row.keys().isdisjoint({"trace_id", "traceId", "start_time", "startTime", "session_id", "sessionId"})
    ),
    parse=parse,
    specification="https://langfuse.com/docs/api-and-data-platform/features/blob-storage-export-fields",
)
