"""Traces that hold arrival times and lengths: Mooncake (with text in its superset), Azure, BurstGPT.

Lengths serve latency work only: no text can be made up whose expert statistics mean anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from reap_serve.records import JsonValue
from reap_serve.traffic.answers.answer import NO_ANSWER
from reap_serve.traffic.body import is_list, kind_of_body
from reap_serve.traffic.fields import clock_time, count, name, seconds
from reap_serve.traffic.formats.openai import request_of_body
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.rows import Row

_MOONCAKE_KEYS = frozenset(
    {"timestamp", "input_length", "output_length", "hash_ids", "session_id", "delay", "text_input", "payload"}
)


def parse_mooncake(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A Mooncake record: `timestamp` in ms, `input_length`, `output_length`; or one with `messages` or `prompt`.

    Raises:
        MalformedRecordError: It has neither text nor an input length.
    """
    timestamp = seconds(row.get("timestamp"), per_second=1000.0)
    session = name(row.get("session_id"))
    prompt_tokens, output_tokens = count(row.get("input_length")), count(row.get("output_length"))
    body = row.get("payload")
    if not isinstance(body, Mapping):
        body = {key: value for key, value in row.items() if key not in _MOONCAKE_KEYS}
        if isinstance(row.get("text_input"), str):
            body["prompt"] = row["text_input"]
    if "messages" not in body and "prompt" not in body:
        blocks = _block_ids(row.get("hash_ids"))
        yield _lengths(origin, slice_name, timestamp, session, prompt_tokens, output_tokens, blocks)
        return
    if "max_tokens" not in body and "max_completion_tokens" not in body and output_tokens:
        body = {**body, "max_tokens": output_tokens}
    request = request_of_body(body, kind_of_body(body), origin, slice_name, NO_ANSWER, None)
    yield replace(
        request, timestamp=timestamp, session=session, prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )


def parse_azure(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A row of an Azure LLM inference trace: `TIMESTAMP` (text, UTC), `ContextTokens`, `GeneratedTokens`.

    Raises:
        MalformedRecordError: A column is no time or no count.
    """
    yield _lengths(
        origin,
        slice_name,
        clock_time(row.get("TIMESTAMP")),
        None,
        count(row.get("ContextTokens")),
        count(row.get("GeneratedTokens")),
    )


def parse_burstgpt(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A row of a BurstGPT trace: `Timestamp` in s, `Request tokens`, `Response tokens`, perhaps `Session ID`.

    Raises:
        MalformedRecordError: A column is no time or no count.
    """
    yield _lengths(
        origin,
        slice_name,
        seconds(row.get("Timestamp")),
        name(row.get("Session ID")),
        count(row.get("Request tokens")),
        count(row.get("Response tokens")),
    )


def _lengths(
    origin: Origin,
    slice_name: str,
    timestamp: float | None,
    session: str | None,
    prompt_tokens: int | None,
    output_tokens: int | None,
    block_ids: tuple[int, ...] | None = None,
) -> Request:
    if not prompt_tokens:
        raise MalformedRecordError("neither text nor a prompt length")
    return Request(
        body=None,
        kind="completion",
        slice=slice_name,
        origin=origin,
        timestamp=timestamp,
        session=session,
        id=str(origin.line),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        block_ids=block_ids,
    )


def _block_ids(value: JsonValue) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not is_list(value):
        raise MalformedRecordError("hash_ids is not a list of whole numbers")
    ids = tuple(item for item in value if isinstance(item, int) and not isinstance(item, bool))
    if len(ids) != len(value):
        raise MalformedRecordError("hash_ids is not a list of whole numbers")
    return ids


def _is_mooncake(row: Row) -> bool:
    """Whether a record has the whole shape of a trace: a time in ms from its beginning, and lengths, blocks or text.

    A log of one's own has a `timestamp` in seconds since 1970 or as text beside `messages`: no trace.
    """
    time = row.get("timestamp")
    if time is not None and (isinstance(time, (str, bool)) or not isinstance(time, (int, float)) or _is_epoch(time)):
        return False
    if "messages" not in row and "prompt" not in row and "input_length" in row:
        return True
    return time is not None and not row.keys().isdisjoint(_MOONCAKE_KEYS - {"timestamp", "session_id", "delay"})


def _is_epoch(time: float) -> bool:
    """Whether a time is one in seconds since 1970; as milliseconds it would be the twelfth day of a trace or later."""
    return 1e9 <= time < 1e11


MOONCAKE = Format(
    name="mooncake",
    has_text=True,
    recognises=_is_mooncake,
    parse=parse_mooncake,
    specification="https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release/traces",
)

AZURE = Format(
    name="azure",
    has_text=False,
    recognises=lambda row: "ContextTokens" in row,
    parse=parse_azure,
    specification="https://github.com/Azure/AzurePublicDataset/blob/master/AzureLLMInferenceDataset2024.md",
)

BURSTGPT = Format(
    name="burstgpt",
    has_text=False,
    recognises=lambda row: "Request tokens" in row,
    parse=parse_burstgpt,
    specification="https://github.com/HPMLL/BurstGPT",
)
