"""Conversation collections: ShareGPT's `{"from", "value"}` turns, and `{"role", "content"}` turns as in WildChat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.fields import name
from reap_serve.traffic.formats.openai import request_of_body
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.rows import Row

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def parse(row: Row, origin: Origin, slice_name: str) -> Iterator[Request]:
    """A conversation, whole: the last assistant turn is the answer, everything before it the prompt.

    Turns after the last assistant turn have no answer; they stay in the prompt.

    Raises:
        MalformedRecordError: The conversation is empty or a turn has no known role.
    """
    turns = row.get("conversations", row.get("conversation"))
    if not is_list(turns):
        raise MalformedRecordError("conversation is not a list")
    if not turns:
        raise MalformedRecordError("conversation is empty")
    messages = [_message(turn, f"turn {index}") for index, turn in enumerate(turns)]
    body: dict[str, JsonValue] = {"messages": messages}
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    if isinstance(row.get("model"), str):
        body["model"] = row["model"]
    request_id = name(row.get("id", row.get("conversation_id", row.get("conversation_hash"))))
    yield request_of_body(body, "chat", origin, slice_name, None, request_id, None)


def _message(turn: JsonValue, place: str) -> Object:
    if not isinstance(turn, Mapping):
        raise MalformedRecordError("turn is not an object", place)
    speaker = turn.get("from", turn.get("role"))
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise MalformedRecordError("turn without a known role", place)
    content = turn.get("value", turn.get("content"))
    if not isinstance(content, str):
        raise MalformedRecordError("turn without text", place)
    return {"role": role, "content": content}


SHAREGPT = Format(
    name="sharegpt",
    has_text=True,
    recognises=lambda row: is_list(row.get("conversations")) or is_list(row.get("conversation")),
    parse=parse,
    specification="https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
)
