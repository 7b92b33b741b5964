"""Text that looks like JSON: messages, an answer, broken JSON of either, or text that a person or a model wrote.

Logs hold messages as JSON text, at times encoded twice, cut off, or as the text of a Python object. A prompt and an
answer may be JSON as well, and then stay as they are, byte for byte. This is the one place that decides between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from pydantic_core import from_json

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.malformed import MalformedRecordError

BROKEN = "broken JSON of messages"
PYTHON_OBJECT = "text of a Python object instead of JSON"

# Texts are decoded so often: once for a table of text, once for a logger that encodes twice, and one to spare.
_ENCODINGS = 3
# How JSON of messages, or of a body around them, begins; quotes may be escaped or single.
_FIRST_KEY = re.compile(r"""["'\\\s]*\[*\s*\{\s*(?:\\*["'](\w+)\\*["']|(role))\s*:""")
# The same cut inside its first key.
_OPENING = re.compile(r"""["'\\\s]*\[*\s*\{\s*\\*["'](\w*)\\*["']?\s*""")
_ROLE_KEY = re.compile(r"""\\*["'](?:role|messages|parts|tool_calls)\\*["']\s*:""")
_KEYS_OF_MESSAGES = frozenset(
    {
        "role",
        "content",
        "messages",
        "message",
        "parts",
        "type",
        "text",
        "model",
        "prompt",
        "input",
        "system",
        "tools",
        "contents",
        "instructions",
        "choices",
        "output",
        "completion",
        "max_tokens",
        "temperature",
        "stream",
        "args",
        "kwargs",
        "object",
        "custom_id",
        "tool_calls",
        "function_call",
    }
)
_PYTHON_OBJECT = re.compile(
    r"""\[?\s*(?:(?:System|Human|AI|Tool|Function|Chat)\w*Message\w*\(|Chat\w*(?:Completion|PromptValue)\w*\("""
    r"""|ModelResponse\(|Message\((?:content|id|role)=|Response\(id=|GenerateContentResponse\(|messages=\["""
    r"""|content=['"].*(?:additional_kwargs|response_metadata|role)=)""",
    re.DOTALL,
)
_ROLES_OF_ANSWERS = ("assistant", "model", "ai")
_ANSWER_KEYS = ("content", "tool_calls", "function_call", "parts", "reasoning", "reasoning_content", "refusal")
_ITEMS_OF_ANSWERS = ("message", "reasoning", "function_call", "custom_tool_call")
_BLOCKS_OF_ANSWERS = {"text": "text", "output_text": "text", "thinking": "thinking", "tool_use": "name"}
# How JSON of an answer that was cut off begins. Other broken JSON is what a model wrote up to its length limit.
_BROKEN_ANSWER = re.compile(
    r"""["'\\\s]*\[*\s*\{\s*\\*["']?(?:role\\*["']?\s*:\s*\\*["'](?:assistant|model)"""
    r"""|(?:choices|output)\\*["']?\s*:\s*\[\s*\{|id\\*["']?\s*:\s*\\*["'](?:chatcmpl|cmpl|resp_|msg_)"""
    r"""|(?:content|reasoning_content|reasoning|tool_calls)\\*["']?\s*:.*\\*["'](?:role|content)\\*["']\s*:"""
    r"""|message\\*["']?\s*:\s*\{\s*\\*["']?(?:role|content)|object\\*["']?\s*:\s*\\*["'](?:chat\.|response))""",
    re.DOTALL,
)


def decoded(value: JsonValue) -> JsonValue:
    """The array or object inside a text that is the JSON of one, also encoded several times; else the value itself."""
    innermost = _innermost(value)
    return innermost if isinstance(innermost, (dict, list)) else value


def _innermost(value: JsonValue) -> JsonValue:
    """What stands inside a text that is the JSON of a text, of an array or of an object, as deep as that goes."""
    for _ in range(_ENCODINGS):
        if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{", '"'):
            break
        inner = _parsed(value)
        if not isinstance(inner, (dict, list, str)):
            break
        value = inner
    return value


def as_object(value: JsonValue) -> Object:
    """The value where it is an object, also as JSON text; else an empty object."""
    value = decoded(value)
    return value if isinstance(value, Mapping) else {}


def structured(value: JsonValue) -> JsonValue:
    """A field that holds a list or an object, as itself or as JSON text.

    Raises:
        MalformedRecordError: It is a text that begins as JSON and is none.
    """
    found = decoded(value)
    if isinstance(found, str) and found.lstrip()[:1] in ("[", "{", '"'):
        raise MalformedRecordError(BROKEN)
    return found


def read_input(value: JsonValue) -> JsonValue:
    """What a logged input is: the JSON inside a text, or the text of a prompt.

    Raises:
        MalformedRecordError: It is broken JSON of messages, or the text of a Python object.
    """
    found = _innermost(value)
    if not isinstance(found, str):
        if is_list(found) and value is not found and all(isinstance(item, (int, float)) for item in found):
            # A list of numbers in a text is that text.
            return value
        return found
    if _PYTHON_OBJECT.match(found):
        raise MalformedRecordError(PYTHON_OBJECT)
    if found.lstrip()[:1] in ("[", "{", '"', "'") and _is_broken(found):
        raise MalformedRecordError(BROKEN)
    return value


def read_output(value: JsonValue) -> JsonValue:
    """What a logged output is: the answer inside its JSON text, or the text that the model wrote, byte for byte.

    JSON is an answer only where it cannot well be anything else: an assistant message, choices with messages, items of
    the Responses API, a stored stream. Everything else is what the model was asked for.

    Raises:
        MalformedRecordError: It is broken JSON of an answer, or the text of a Python object.
    """
    if not isinstance(value, str):
        return value
    inner = _innermost(value)
    if not isinstance(inner, str):
        return inner if is_answer(inner) else value
    if _PYTHON_OBJECT.match(inner):
        raise MalformedRecordError(PYTHON_OBJECT)
    if inner.lstrip()[:1] in ("[", "{", '"') and _BROKEN_ANSWER.match(inner) and _parsed(inner) is None:
        raise MalformedRecordError("broken JSON of an answer")
    return value


def read_content(content: JsonValue, role: JsonValue) -> JsonValue:
    """A message's content in a log, where instrumentations write parts as JSON text.

    What a tool returned stays as it is: tools do return such JSON.

    Raises:
        MalformedRecordError: It is broken JSON of parts.
    """
    if not isinstance(content, str) or role in ("tool", "function"):
        return content
    start = content.lstrip()[:40]
    if not start.startswith(("[", '"[')) or "type" not in start:
        return content
    inner = decoded(content)
    if isinstance(inner, str):
        if re.match(r"""["\s]*\[\s*\{\s*\\*["']type\\*["']\s*:\s*\\*["'](?:\w*text|image|tool|thinking)""", inner):
            raise MalformedRecordError("broken JSON of content parts")
        return content
    if not is_list(inner) or not inner or not all(map(_is_block, inner)):
        return content
    only = inner[0] if len(inner) == 1 and isinstance(inner[0], Mapping) else {}
    text = only.get("text", only.get("content"))
    return text if only.get("type") == "text" else inner


def is_answer(value: JsonValue) -> bool:
    """Whether a JSON value, found inside a text, is a recorded answer rather than JSON that a model wrote."""
    if is_list(value):
        return bool(value) and (
            all(_is_message(item) for item in value)
            or all(isinstance(item, Mapping) and _is_message(item.get("message")) for item in value)
            or all(_is_chunk(item) for item in value)
            or (all(_is_item(item) for item in value) and any(_is_whole_item(item) for item in value))
            or all(_is_block(item) for item in value)
        )
    if not isinstance(value, Mapping):
        return False
    if _is_message(value) or _is_message(value.get("message")) or _is_chunk(value):
        return True
    choices, output, messages = value.get("choices"), value.get("output"), value.get("messages")
    if is_list(messages) and messages and value.keys() <= {"messages"}:
        return _is_message(messages[-1])
    if is_list(choices) and choices:
        return all(isinstance(item, Mapping) and not item.keys().isdisjoint(("message", "text")) for item in choices)
    return value.get("object") == "response" or (is_list(output) and bool(output) and all(map(_is_whole_item, output)))


def _parsed(text: str) -> JsonValue:
    try:
        value: JsonValue = from_json(text, allow_inf_nan=False)
    except (ValueError, RecursionError):
        return None
    return value


def _is_broken(text: str) -> bool:
    opening = _OPENING.fullmatch(text)
    if opening is not None and any(key.startswith(opening[1]) for key in _KEYS_OF_MESSAGES):
        return True
    first = _FIRST_KEY.match(text)
    if first is None or _parsed(text) is not None:
        return False
    if (first[1] or first[2]) in _KEYS_OF_MESSAGES or _ROLE_KEY.search(text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text.lstrip())
        except (ValueError, RecursionError):
            return True
        # A whole value and something after it: a person's text about some JSON, or messages and a mark of their end.
        return bool(_ROLE_KEY.search(json.dumps(value)))
    return False


def _is_message(value: JsonValue) -> bool:
    return (
        isinstance(value, Mapping)
        and value.get("role") in _ROLES_OF_ANSWERS
        and any(value.get(key) is not None for key in _ANSWER_KEYS)
    )


def _is_chunk(value: JsonValue) -> bool:
    if not isinstance(value, Mapping):
        return False
    kind = value.get("object")
    return isinstance(kind, str) and kind.startswith(("chat.completion", "text_completion"))


def _is_item(value: JsonValue) -> bool:
    return isinstance(value, Mapping) and value.get("type") in _ITEMS_OF_ANSWERS


def _is_whole_item(value: JsonValue) -> bool:
    if not isinstance(value, Mapping):
        return False
    match value.get("type"):
        case "message":
            return is_list(value.get("content"))
        case "function_call" | "custom_tool_call":
            return isinstance(value.get("name"), str)
        case "reasoning":
            return is_list(value.get("summary")) or is_list(value.get("content"))
    return False


def _is_block(value: JsonValue) -> bool:
    if not isinstance(value, Mapping):
        return False
    kind = value.get("type")
    if kind == "image_url":
        return True
    key = _BLOCKS_OF_ANSWERS.get(kind) if isinstance(kind, str) else None
    return key is not None and isinstance(value.get(key, value.get("content")), str)


def all_texts(values: Sequence[JsonValue]) -> bool:
    """Whether a list holds texts only."""
    return bool(values) and all(isinstance(value, str) for value in values)
