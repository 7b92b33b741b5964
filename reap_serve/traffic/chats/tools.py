"""Definitions of tools, in every API that logs hold, as OpenAI's chat API has them."""

from __future__ import annotations

from collections.abc import Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.json_text import decoded
from reap_serve.traffic.malformed import MalformedRecordError

_SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema", "parameters_json_schema", "json_schema")


def chat_tools(value: JsonValue, key: str = "tools") -> list[Object]:
    """OpenAI tools from a list of tools, or its JSON text.

    Read are OpenAI's own form, the flat one of its Responses API and of GenAI spans, Anthropic's (`input_schema`),
    Gemini's (`functionDeclarations`), bare functions, and each of them as JSON text.

    Args:
        value: The list; absent or empty gives an empty one.
        key: Name of the field, for the error.

    Raises:
        MalformedRecordError: It is no list of tools, or a tool is no function: a provider's own tool has no
            definition in the record.
    """
    if value is None:
        return []
    value = decoded(value)
    if value == "" or value == {}:
        return []
    if isinstance(value, Mapping):
        # The AI SDK keys tools by name; a single tool stands alone.
        value = [value] if "name" in value or "function" in value else [_named(*item) for item in value.items()]
    if not is_list(value):
        raise MalformedRecordError(f"{key} is not a list of objects")
    found: list[Object] = []
    for item in value:
        tool = decoded(item)
        if not isinstance(tool, Mapping):
            raise MalformedRecordError(f"{key} is not a list of objects")
        declarations = tool.get("functionDeclarations", tool.get("function_declarations"))
        if is_list(declarations):
            found.extend(chat_tools(declarations, key))
        else:
            found.append(_chat_tool(tool))
    return found


def tool_of_message(message: Object) -> Object | None:
    """The tool that a message stands for where a tracing tool lists tools behind the messages; None for a message.

    Langfuse's handler of LangChain gives each tool the role `tool`. A result names its call, and is no definition.
    """
    if message.get("role") != "tool" or message.get("tool_call_id") is not None:
        return None
    tool = decoded(message.get("content"))
    if not isinstance(tool, Mapping):
        return None
    is_tool = isinstance(tool.get("function"), Mapping) and tool.get("type") == "function"
    return tool if is_tool or (isinstance(tool.get("name"), str) and "input_schema" in tool) else None


def _named(name: str, tool: JsonValue) -> JsonValue:
    return {"name": name, **tool} if isinstance(tool, Mapping) else tool


def _chat_tool(tool: Object) -> Object:
    function = tool.get("function")
    if isinstance(function, Mapping):
        if not isinstance(function.get("name"), str):
            raise MalformedRecordError("tool without a name")
        return tool if "type" in tool else {"type": "function", **tool}
    if isinstance(tool.get("custom"), Mapping):
        return tool
    kind, name = tool.get("type"), tool.get("name")
    if not isinstance(name, str) or kind not in (None, "function", "custom") or "format" in tool:
        raise MalformedRecordError("tool that is no function")
    if kind == "custom" and not any(key in tool for key in _SCHEMA_KEYS):
        raise MalformedRecordError("tool that is no function")
    found: dict[str, JsonValue] = {"name": name}
    if tool.get("description") is not None:
        found["description"] = tool["description"]
    schema = next((decoded(tool[key]) for key in _SCHEMA_KEYS if tool.get(key) is not None), None)
    if schema is not None:
        found["parameters"] = schema
    if tool.get("strict") is not None:
        found["strict"] = tool["strict"]
    return {"type": "function", "function": found}
