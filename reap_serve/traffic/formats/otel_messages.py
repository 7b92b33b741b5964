"""Messages of the GenAI semantic conventions (a role and typed parts) as OpenAI chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.formats.otel_values import Attributes
from reap_serve.traffic.malformed import MalformedRecordError


def chat_messages(messages: JsonValue) -> list[Object]:
    """OpenAI messages from `[{"role", "parts": [{"type", ...}]}]`; a message in OpenAI's own form stays as it is.

    A message with several tool results becomes one `tool` message a result.

    Raises:
        MalformedRecordError: A message has no parts, or a part has no counterpart in the OpenAI API.
    """
    if not is_list(messages):
        raise MalformedRecordError("messages is not a list")
    converted: list[Object] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise MalformedRecordError("message is not an object", f"message {index}")
        parts = message.get("parts")
        if parts is None:
            converted.append(message)
        elif is_list(parts):
            converted.extend(_of_parts(message.get("role"), parts))
        else:
            raise MalformedRecordError("parts is not a list", f"message {index}")
    return converted


def chat_tools(tools: JsonValue) -> list[Object]:
    """OpenAI tools from `[{"type": "function", "name", "description", "parameters"}]`.

    Raises:
        MalformedRecordError: It is no list of objects.
    """
    if not is_list(tools):
        raise MalformedRecordError("tools is not a list of objects")
    converted: list[Object] = []
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise MalformedRecordError("tools is not a list of objects")
        if "function" in tool:
            converted.append(tool)
        else:
            converted.append(
                {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}
            )
    return converted


def indexed_messages(attributes: Attributes, prefix: str) -> list[Object]:
    """OpenAI messages from the older attributes `<prefix>.<i>.role` and `<prefix>.<i>.content`."""
    messages: list[Object] = []
    while (content := attributes.get(f"{prefix}.{len(messages)}.content")) is not None:
        default = "assistant" if prefix.endswith("completion") else "user"
        role = attributes.get(f"{prefix}.{len(messages)}.role", default)
        messages.append({"role": role, "content": content})
    return messages


def _of_parts(role: JsonValue, parts: Sequence[JsonValue]) -> list[Object]:
    content: list[Object] = []
    calls: list[Object] = []
    results: list[Object] = []
    reasoning: list[str] = []
    for part in parts:
        if not isinstance(part, Mapping):
            raise MalformedRecordError("message part is not an object")
        kind = part.get("type")
        if kind == "text":
            content.append({"type": "text", "text": _text(part.get("content"))})
        elif kind == "reasoning":
            reasoning.append(_text(part.get("content")))
        elif kind == "tool_call":
            calls.append(_tool_call(part))
        elif kind == "tool_call_response":
            # `result` is the key of the first versions of the conventions.
            response = part.get("response", part.get("result"))
            results.append({"role": "tool", "tool_call_id": part.get("id"), "content": _as_text(response)})
        elif kind in ("uri", "blob") and part.get("modality") == "image":
            content.append({"type": "image_url", "image_url": {"url": _image_url(part)}})
        else:
            raise MalformedRecordError("message part that is neither text, reasoning, tool call nor image")
    if results and not content and not calls:
        return results
    message: dict[str, JsonValue] = {"role": role, "content": _content(content)}
    if reasoning:
        message["reasoning"] = "\n".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return [*results, message]


def _content(parts: list[Object]) -> JsonValue:
    if not parts:
        return None
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts


def _tool_call(part: Object) -> Object:
    function = {"name": part.get("name"), "arguments": _as_text(part.get("arguments"))}
    return {"id": part.get("id"), "type": "function", "function": function}


def _image_url(part: Object) -> str:
    if part.get("type") == "uri":
        return _text(part.get("uri"))
    return f"data:{part.get('mime_type') or 'image/png'};base64,{_text(part.get('content'))}"


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise MalformedRecordError("message part without text")
    return value


def _as_text(value: JsonValue) -> str:
    """Text as it is; other values as JSON, in the order in which they were recorded."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
