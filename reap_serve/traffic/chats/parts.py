"""Typed parts of a message, in every API that logs hold, as content, tool calls, tool results and reasoning.

| API | text | reasoning | call | result | image |
|---|---|---|---|---|---|
| OpenAI chat | `text` | | | | `image_url` |
| OpenAI Responses | `input_text`, `output_text` | `reasoning_text` | | | `input_image` |
| Anthropic | `text` | `thinking` | `tool_use` | `tool_result` | `image` |
| OTel GenAI | `text` (`content`) | `reasoning` | `tool_call` | `tool_call_response` | `uri`, `blob` |
| Vercel AI SDK | `text` | `reasoning` | `tool-call` | `tool-result` | `image` |
| Gemini, Bedrock | `{"text"}` | | `functionCall`, `toolUse` | `functionResponse`, `toolResult` | |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.malformed import MalformedRecordError

# What the OpenAI API itself has: passed on as it was recorded, for vLLM to take or to refuse.
_OPENAI_PARTS = frozenset(
    {"image_url", "input_audio", "audio_url", "video_url", "image_embeds", "image_pil", "file", "video", "audio"}
)
_TEXT = frozenset({"text", "input_text", "output_text"})
_REASONING = frozenset({"reasoning", "thinking", "reasoning_text", "summary_text"})
_CALLS = frozenset({"tool_use", "tool_call", "tool-call", "function_call"})
_RESULTS = frozenset({"tool_result", "tool_call_response", "tool-result", "tool_response"})
# Types whose text is not in the record, by what to call them.
_WITHOUT_TEXT = {
    "redacted_thinking": "thinking that its provider encrypted",
    "server_tool_use": "call of a provider's own tool",
    "web_search_tool_result": "result of a provider's own tool",
    "tool-invocation": "tool call of a user interface",
    "item_reference": "reference to an item that a server keeps",
}


@dataclass(slots=True)
class Pieces:
    """What a message's parts hold.

    Attributes:
        content: Text and media parts of the OpenAI API, in order.
        calls: OpenAI tool calls.
        results: OpenAI `tool` messages.
        reasoning: Texts of the reasoning.
        from_tool_use: Whether a call came from a `tool_use` block, which Anthropic's API wants answered at once.
    """

    content: list[Object] = field(default_factory=list)
    calls: list[Object] = field(default_factory=list)
    results: list[Object] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    from_tool_use: bool = False

    def joined_content(self) -> JsonValue:
        """One text part as its text, several as they are; None without any."""
        if not self.content:
            return None
        if len(self.content) == 1 and self.content[0]["type"] == "text":
            return self.content[0]["text"]
        return self.content


def are_openai_parts(parts: Sequence[JsonValue]) -> bool:
    """Whether a content needs no translation: text parts that hold text, and other types of OpenAI's chat API."""
    for part in parts:
        if isinstance(part, str):
            continue
        if not isinstance(part, dict):
            return False
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                return False
        elif not isinstance(kind, str) or kind in _FOREIGN:
            return False
    return True


def pieces_of(parts: Sequence[JsonValue], place: str) -> Pieces:
    """The pieces that a list of parts holds.

    Raises:
        MalformedRecordError: A part is of an unknown kind, or its text is not in the record.
    """
    pieces = Pieces()
    for part in parts:
        if isinstance(part, str):
            pieces.content.append({"type": "text", "text": part})
        elif isinstance(part, Mapping):
            _add(pieces, part, place)
        else:
            raise MalformedRecordError("content part without a type", place)
    return pieces


def text_of_parts(value: JsonValue, place: str) -> str:
    """The text of a tool result: itself, or its text parts by line; other values as JSON.

    Raises:
        MalformedRecordError: A part is no text.
    """
    if isinstance(value, str):
        return value
    if is_list(value) and value and all(_is_typed(item) for item in value):
        found = pieces_of(value, place)
        texts = [part["text"] for part in found.content if part.get("type") == "text"]
        if len(texts) != len(value):
            raise MalformedRecordError("tool result that holds more than text", place)
        return "\n".join(str(text) for text in texts)
    return as_json(value)


def as_json(value: JsonValue) -> str:
    """Text as it is; other values as JSON, in the order in which they were recorded."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)


def tool_call(call_id: JsonValue, name: JsonValue, arguments: JsonValue) -> Object:
    """An OpenAI tool call; arguments that are no text become JSON."""
    text = "{}" if arguments is None else as_json(arguments)
    found: dict[str, JsonValue] = {"id": call_id} if call_id is not None else {}
    return found | {"type": "function", "function": {"name": name, "arguments": text}}


def _is_typed(value: JsonValue) -> bool:
    return isinstance(value, Mapping) and value.get("type") in (*_TEXT, "image", "image_url", "input_image")


def _add(pieces: Pieces, part: Object, place: str) -> None:
    kind = part.get("type")
    if kind is None:
        _add_untyped(pieces, part, place)
    elif not isinstance(kind, str):
        raise MalformedRecordError("content part without a type", place)
    elif kind in _TEXT:
        pieces.content.append({"type": "text", "text": _text(part, ("text", "content"), place)})
    elif kind == "refusal":
        pieces.content.append({"type": "text", "text": _text(part, ("refusal",), place)})
    elif kind in _REASONING:
        pieces.reasoning.append(_text(part, ("thinking", "text", "content", "reasoning"), place))
    elif kind in _CALLS:
        pieces.calls.append(_call(part))
        pieces.from_tool_use |= kind == "tool_use"
    elif kind in _RESULTS:
        pieces.results.append(_result(part, place))
    elif kind in ("image", "input_image", "uri", "blob"):
        pieces.content.append({"type": "image_url", "image_url": {"url": _image_url(part, place)}})
    elif kind in _WITHOUT_TEXT:
        raise MalformedRecordError(_WITHOUT_TEXT[kind], place)
    elif kind in _OPENAI_PARTS:
        pieces.content.append(part)
    else:
        raise MalformedRecordError("message part that is neither text, reasoning, tool call nor image", place)


def _add_untyped(pieces: Pieces, part: Object, place: str) -> None:
    """A part of Gemini's or Bedrock's API, which names its kind by its key."""
    if isinstance(part.get("text"), str):
        if part.get("thought") is True:
            pieces.reasoning.append(str(part["text"]))
        else:
            pieces.content.append({"type": "text", "text": part["text"]})
        return
    for key in ("functionCall", "function_call", "toolUse"):
        call = part.get(key)
        if isinstance(call, Mapping):
            pieces.calls.append(_call(call))
            return
    for key in ("functionResponse", "function_response", "toolResult"):
        result = part.get(key)
        if isinstance(result, Mapping):
            pieces.results.append(_result(result, place))
            return
    raise MalformedRecordError("content part without a type", place)


def _text(part: Object, keys: Sequence[str], place: str) -> str:
    for key in keys:
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("value")
        if isinstance(value, str):
            return value
    raise MalformedRecordError("message part without text", place)


def _first(part: Object, *keys: str) -> JsonValue:
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _call(part: Object) -> Object:
    return tool_call(
        _first(part, "id", "call_id", "toolCallId", "tool_call_id", "toolUseId"),
        _first(part, "name", "toolName", "tool_name"),
        _first(part, "arguments", "input", "args"),
    )


def _result(part: Object, place: str) -> Object:
    # `result` is the key of the first GenAI conventions and of the first AI SDK.
    value = _first(part, "response", "content", "output", "result")
    if isinstance(value, Mapping) and value.get("type") in ("text", "json", "error-text", "error-json", "content"):
        value = value.get("value")
    message: dict[str, JsonValue] = {
        "role": "tool",
        "tool_call_id": _first(part, "tool_use_id", "id", "toolCallId", "tool_call_id", "call_id", "toolUseId"),
        "content": "" if value is None else text_of_parts(value, place),
    }
    return message if message["tool_call_id"] is not None else {k: v for k, v in message.items() if k != "tool_call_id"}


def _image_url(part: Object, place: str) -> str:
    kind, source = part.get("type"), part.get("source")
    if kind in ("uri", "blob") and part.get("modality") != "image":
        raise MalformedRecordError("message part that is neither text, reasoning, tool call nor image", place)
    if isinstance(source, Mapping):
        if source.get("type") == "url" or "data" not in source:
            return _text(source, ("url",), place)
        return f"data:{source.get('media_type') or 'image/png'};base64,{_text(source, ('data',), place)}"
    if kind == "blob":
        return f"data:{part.get('mime_type') or 'image/png'};base64,{_text(part, ('content',), place)}"
    url = part.get("image_url")
    if isinstance(url, Mapping):
        return _text(url, ("url",), place)
    return _text(part, ("uri", "image_url", "image", "url"), place)


_FOREIGN = (
    (_TEXT - {"text"})
    | _REASONING
    | _CALLS
    | _RESULTS
    | frozenset(_WITHOUT_TEXT)
    | {"refusal", "image", "input_image", "uri", "blob"}
)
