"""Whether an answer keeps to the form that its own request asked for: a JSON schema, or the schemas of its tools."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reap_serve.records import JsonValue

_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool in an answer.

    Attributes:
        name: Of the tool; None where the call has none.
        arguments: As the model wrote them, JSON if all is well.
    """

    name: str | None
    arguments: str


def calls_in_text(text: str) -> list[ToolCall]:
    """Calls in the form of the Hermes and Qwen families: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""
    calls = []
    for content in _TOOL_CALL.findall(text):
        value = _json(content)
        name = value.get("name") if isinstance(value, Mapping) else None
        arguments = value.get("arguments") if isinstance(value, Mapping) else None
        calls.append(ToolCall(name if isinstance(name, str) else None, json.dumps(arguments)))
    return calls


def calls_in_message(message: Mapping[str, JsonValue]) -> list[ToolCall]:
    """Calls of a chat completion's message."""
    calls = []
    listed = message.get("tool_calls")
    for call in listed if isinstance(listed, Sequence) and not isinstance(listed, str) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            name, arguments = function.get("name"), function.get("arguments")
            calls.append(
                ToolCall(
                    name if isinstance(name, str) else None,
                    arguments if isinstance(arguments, str) else json.dumps(arguments),
                )
            )
    return calls


def tool_calls_valid(calls: Sequence[ToolCall], body: Mapping[str, JsonValue]) -> bool | None:
    """Whether there is a call, and each names a tool of the request with arguments that its schema allows.

    Returns:
        None when the jsonschema package is not installed.
    """
    if not _installed():
        return None
    schemas = _tool_schemas(body)
    return bool(calls) and all(
        call.name in schemas and _matches(_json(call.arguments), schemas[call.name], kind=Mapping) for call in calls
    )


def json_valid(text: str, body: Mapping[str, JsonValue]) -> bool | None:
    """Whether a text, after any reasoning, is the JSON that the request's `response_format` asks for.

    Returns:
        None when the request asks for none, or the jsonschema package is not installed.
    """
    if not asks_for_json(body) or not _installed():
        return None
    wanted = body["response_format"]
    assert isinstance(wanted, Mapping)
    described = wanted.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    value = _json(text.rpartition("</think>")[2])
    return _matches(value, schema if isinstance(schema, Mapping) else {}, kind=Mapping if schema is None else object)


def asks_for_json(body: Mapping[str, JsonValue]) -> bool:
    """Whether a request asks for JSON by `response_format`."""
    wanted = body.get("response_format")
    return isinstance(wanted, Mapping) and wanted.get("type") in ("json_object", "json_schema")


def asks_for_tool(body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> bool:
    """Whether a request offers tools and its recorded answer called one, or `tool_choice` demands one."""
    choice = body.get("tool_choice")
    demanded = choice == "required" or isinstance(choice, Mapping)
    return bool(body.get("tools")) and (demanded or bool(answer and answer.get("tool_calls")))


def _tool_schemas(body: Mapping[str, JsonValue]) -> dict[str | None, Mapping[str, JsonValue]]:
    schemas: dict[str | None, Mapping[str, JsonValue]] = {}
    tools = body.get("tools")
    for tool in tools if isinstance(tools, Sequence) and not isinstance(tools, str) else ():
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            schemas[str(function["name"])] = parameters if isinstance(parameters, Mapping) else {}
    return schemas


class _NotJson:
    """Stands for a text that is not JSON: null is."""


def _json(text: str) -> JsonValue | _NotJson:
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        return _NotJson()
    return value


def _installed() -> bool:
    return importlib.util.find_spec("jsonschema") is not None


def _matches(value: JsonValue | _NotJson, schema: Mapping[str, JsonValue], *, kind: type) -> bool:
    """Whether a value is of a type and meets a schema; a schema that is itself wrong demands nothing more."""
    import jsonschema
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    if isinstance(value, _NotJson) or not isinstance(value, kind):
        return False
    kind_of_schema = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind_of_schema.check_schema(schema)
        # An empty registry: what a schema of the traffic refers to elsewhere is not fetched.
        return bool(kind_of_schema(schema, registry=Registry()).is_valid(value))
    except (jsonschema.exceptions.SchemaError, Unresolvable):
        return True
