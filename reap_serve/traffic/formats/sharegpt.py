"""Conversation collections: ShareGPT's `{"from", "value"}` turns, and `{"role", "content"}` turns as in WildChat.

Variants with tools: turns of `function_call` and `observation`, and `tools` beside the turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.answers.answer import NO_ANSWER
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.chats.bodies import MEDIA_KEYS
from reap_serve.traffic.fields import name
from reap_serve.traffic.formats.openai import request_of_body
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.json_text import decoded
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
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
}
_CALLERS = ("function_call", "tool_call", "tool_calls")
# Fields beside the turns that the model was shown, and that are taken over or refused.
_PROMPT_KEYS = ("tools", "functions", "chosen", "rejected", *MEDIA_KEYS)
_SYSTEM_KEYS = ("system", "system_prompt")


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
    body |= {key: row[key] for key in _PROMPT_KEYS if row.get(key) not in (None, "", [])}
    for key in _SYSTEM_KEYS:
        if row.get(key):
            body["system"] = row[key]
            break
    if isinstance(row.get("model"), str):
        body["model"] = row["model"]
    request_id = name(row.get("id", row.get("conversation_id", row.get("conversation_hash"))))
    yield request_of_body(body, "chat", origin, slice_name, NO_ANSWER, request_id)


def _message(turn: JsonValue, place: str) -> Object:
    if not isinstance(turn, Mapping):
        raise MalformedRecordError("turn is not an object", place)
    for key in MEDIA_KEYS:
        if turn.get(key) not in (None, "", [], {}):
            raise MalformedRecordError(f"{key} beside the text of a turn", place)
    speaker = turn.get("from", turn.get("role"))
    known = speaker.lower() if isinstance(speaker, str) else ""
    content = turn.get("value", turn.get("content"))
    if known in _CALLERS:
        return {"role": "assistant", "content": None, "tool_calls": _calls(content, place)}
    role = _ROLES.get(known)
    if role is None:
        raise MalformedRecordError("turn without a known role", place)
    if "value" in turn or not isinstance(turn.get("role"), str):
        if not isinstance(content, str):
            raise MalformedRecordError("turn without text", place)
        return {"role": role, "content": content}
    return {**{key: turn[key] for key in _MESSAGE_KEYS if turn.get(key) is not None}, "role": role}


_MESSAGE_KEYS = (
    "content",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    "parts",
    "reasoning",
    "reasoning_content",
)


def _calls(value: JsonValue, place: str) -> list[JsonValue]:
    found = decoded(value)
    calls = found if is_list(found) else [found]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise MalformedRecordError("turn of a function call that is no JSON", place)
    return list(calls)


SHAREGPT = Format(
    name="sharegpt",
    has_text=True,
    recognises=lambda row: is_list(row.get("conversations")) or is_list(row.get("conversation")),
    parse=parse,
    specification="https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
)
