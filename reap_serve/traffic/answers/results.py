"""Answers as SDKs hand them to a tracing tool: objects of their own around a text and its calls."""

from __future__ import annotations

from collections.abc import Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list


def sdk_message(value: Object) -> Object | None:
    """The message of typed parts that a result of the AI SDK stands for: `text`, `toolCalls`, perhaps `reasoning`.

    None where the object is none: JSON that a model wrote may have a `text`, too.
    """
    calls, text, thought = value.get("toolCalls"), value.get("text"), value.get("reasoning")
    if not is_list(calls) or not (text is None or isinstance(text, str)):
        return None
    found: list[Mapping[str, JsonValue]] = [call for call in calls if isinstance(call, Mapping) and "toolName" in call]
    if len(found) != len(calls) or not (found or text):
        return None
    parts: list[JsonValue] = [{"type": "reasoning", "text": thought}] if isinstance(thought, str) and thought else []
    parts += [{"type": "text", "text": text}] if text else []
    parts += [{**call, "type": "tool-call"} for call in found]
    return {"role": "assistant", "content": parts}


def replies_of(value: Object) -> list[JsonValue]:
    """The replies of a generator of Haystack's; empty where the object is none."""
    replies = value.get("replies")
    return list(replies) if is_list(replies) and value.keys() <= {"replies", "meta"} else []
