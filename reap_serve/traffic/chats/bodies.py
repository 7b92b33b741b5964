"""Bodies of other APIs, and retired fields of OpenAI's own, as bodies of its chat and completions endpoints."""

from __future__ import annotations

from collections.abc import Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list, is_responses_body
from reap_serve.traffic.chats.messages import chat_messages
from reap_serve.traffic.chats.parts import pieces_of
from reap_serve.traffic.chats.tools import chat_tools
from reap_serve.traffic.malformed import MalformedRecordError

# What a model was shown beside the messages, in collections of conversations.
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "attachments", "files")
# The same, and pairs of which neither answer was recorded.
_UNREAD_KEYS = frozenset((*MEDIA_KEYS, "prompt_embeds", "chosen", "rejected"))
# What collections of instructions and other servers join with a prompt before the model reads it.
_BESIDE_PROMPT = ("suffix", "system", "template", "input", "instruction", "instructions", "history")
_KEPT_BY_SERVER = ("previous_response_id", "conversation")
_LENGTH_KEY = {"max_output_tokens": "max_completion_tokens"}
_DROPPED = frozenset({"input", "reasoning", "text", "include", "background", "truncation", "store"})


def chat_body(body: Object) -> Object:
    """A body of OpenAI's chat endpoint, from one of its own, of the Responses or of the Anthropic API.

    Raises:
        MalformedRecordError: What the model was shown is not in the body, or is not read.
    """
    _refuse_unread(body, "messages")
    body = {**body}
    if is_responses_body(body):
        body = _of_responses(body)
    elif "contents" in body and "messages" not in body:
        raise MalformedRecordError("body of a Gemini request")
    messages = chat_messages(body.get("messages"))
    system = _system_text(body.pop("system", body.pop("instructions", None)))
    if system:
        first = messages[0] if messages else {}
        if first.get("role") not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif first.get("content") != system:
            raise MalformedRecordError("system beside a system message")
    body["messages"] = messages
    _take_tools(body)
    if "stop_sequences" in body:
        body.setdefault("stop", body.pop("stop_sequences"))
    thinking = body.pop("thinking", None)
    if isinstance(thinking, Mapping) and thinking.get("type") == "disabled":
        body.setdefault("reasoning_effort", "none")
    return body


def completion_body(body: Object) -> Object:
    """A body of OpenAI's completions endpoint.

    Raises:
        MalformedRecordError: It has a field that vLLM does not take.
    """
    for key in _BESIDE_PROMPT:
        if body.get(key):
            raise MalformedRecordError(f"{key} beside the prompt")
    if context := body.get("context"):
        raise MalformedRecordError(f"context {'of earlier turns ' if is_list(context) else ''}beside the prompt")
    _refuse_unread(body, "prompt")
    return body


def _refuse_unread(body: Object, beside: str) -> None:
    for key in sorted(_UNREAD_KEYS.intersection(body)):
        if body.get(key) not in (None, "", [], {}):
            raise MalformedRecordError(f"{key} beside the {beside}")


def _of_responses(body: Object) -> dict[str, JsonValue]:
    for key in _KEPT_BY_SERVER:
        if body.get(key) is not None:
            raise MalformedRecordError(f"{key}: turns that only the server has")
    if body.get("prompt") is not None:
        raise MalformedRecordError("prompt that only the server has")
    given = body.get("input")
    items: list[JsonValue] = [{"role": "user", "content": given}] if isinstance(given, str) else []
    if is_list(given):
        items = list(given)
    found: dict[str, JsonValue] = {}
    for key, value in body.items():
        if key not in _DROPPED:
            found[_LENGTH_KEY.get(key, key)] = value
    reasoning = body.get("reasoning")
    if isinstance(reasoning, Mapping) and reasoning.get("effort") is not None:
        found["reasoning_effort"] = reasoning["effort"]
    text = body.get("text")
    form = text.get("format") if isinstance(text, Mapping) else None
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        schema = {key: value for key, value in form.items() if key != "type"}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif isinstance(form, Mapping) and form.get("type") == "json_object":
        found["response_format"] = {"type": "json_object"}
    return {**found, "messages": items}


def _system_text(system: JsonValue) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    if isinstance(system, Mapping):
        system = [system]
    if not is_list(system):
        raise MalformedRecordError("system is neither text nor a list of parts")
    pieces = pieces_of(system, "system")
    texts = [part.get("text") for part in pieces.content if part["type"] == "text"]
    if len(texts) != len(system):
        raise MalformedRecordError("system is neither text nor a list of parts")
    # As vLLM's own Messages endpoint joins them.
    return "".join(str(text) for text in texts)


def _take_tools(body: dict[str, JsonValue]) -> None:
    metadata = body.get("metadata")
    tools = chat_tools(body.get("tools"))
    if not tools and isinstance(metadata, Mapping) and is_list(listed := metadata.get("tools")):
        # OpenAI's metadata hold texts alone: tracing tools keep there what was sent beside the messages.
        tools = chat_tools(listed)
    functions = chat_tools(body.pop("functions", None), "functions")
    called = body.pop("function_call", None)
    if tools or functions:
        body["tools"] = [*tools, *(item for item in functions if item not in tools)]
    else:
        body.pop("tools", None)
    choice = body.get("tool_choice", called)
    if choice is None:
        return
    if isinstance(choice, Mapping):
        kind, name = choice.get("type"), choice.get("name")
        if isinstance(name, str):
            choice = {"type": "function", "function": {"name": name}}
        elif kind in ("auto", "none", "any"):
            choice = "required" if kind == "any" else kind
    body["tool_choice"] = choice
