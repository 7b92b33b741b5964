"""OpenAI request bodies: whether one is sound, what kind it is, and where its recorded answer stands.

The checks cover what every later stage relies on (chat templates index `role` and `content`); the rest of a body is
passed on as it was recorded. Building the pydantic models of the `openai` package for each line would cost more than
parsing the JSON does, and would refuse the fields that vLLM adds to the API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard, cast

from reap_serve.records import JsonValue
from reap_serve.slice_name import RULE, is_slice_name
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Kind

Object = Mapping[str, JsonValue]

SLICE_KEY = "reap_slice"
TIMESTAMP_KEY = "reap_timestamp"
SESSION_KEY = "reap_session"
# The reason that OpenAI's API gives for an answer that ended at `max_tokens`.
LENGTH_LIMIT = "length"

# Endpoints of the batch API that hold no chat or completion (https://platform.openai.com/docs/api-reference/batch).
_OTHER_ENDPOINTS = ("embeddings", "responses", "moderations", "images/generations", "score", "rerank", "audio")


def kind_of_endpoint(url: str) -> Kind:
    """The kind of request that an endpoint takes.

    Raises:
        MalformedRecordError: The endpoint takes neither chats nor completions.
    """
    path = url.split("?", 1)[0].rstrip("/")
    if path.endswith("chat/completions"):
        return "chat"
    if path.endswith("completions"):
        return "completion"
    for endpoint in _OTHER_ENDPOINTS:
        if endpoint in path:
            raise MalformedRecordError(f"endpoint {endpoint} is neither chat nor completion")
    raise MalformedRecordError("unknown endpoint")


def kind_of_body(body: Object) -> Kind:
    """The kind of a body by its keys.

    Raises:
        MalformedRecordError: The body has neither `messages` nor `prompt`.
    """
    if "messages" in body:
        return "chat"
    if "prompt" in body:
        return "completion"
    if "input" in body:
        raise MalformedRecordError("body of an embeddings or responses request")
    raise MalformedRecordError("body without messages or prompt")


def check_body(body: Object, kind: Kind) -> Object:
    """The body, sound for its kind; a prompt list of one prompt becomes that prompt.

    Raises:
        MalformedRecordError: A field that the later stages rely on is absent or of another type.
    """
    if kind == "chat":
        check_messages(body.get("messages"))
    else:
        body = _check_prompt(body)
    for key in ("tools", "functions", "documents"):
        value = body.get(key)
        if value is not None and not (is_list(value) and all(isinstance(item, Mapping) for item in value)):
            raise MalformedRecordError(f"{key} is not a list of objects")
    return body


def check_messages(messages: JsonValue) -> Sequence[Object]:
    """A list of chat messages, each an object with a role and a content.

    Raises:
        MalformedRecordError: It is not such a list, or it is empty.
    """
    if not is_list(messages):
        raise MalformedRecordError("messages is not a list")
    if not messages:
        raise MalformedRecordError("messages is empty")
    for index, message in enumerate(messages):
        check_message(message, f"messages[{index}]")
    return cast("Sequence[Object]", messages)


def check_message(message: JsonValue, place: str) -> Object:
    """A chat message: a role, and a content that is text, a list of typed parts, or null beside other fields.

    Raises:
        MalformedRecordError: It is none.
    """
    if not isinstance(message, dict):
        raise MalformedRecordError("message is not an object", place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise MalformedRecordError("message without a role", place)
    content = message.get("content")
    if is_list(content):
        for part in content:
            if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("type"), str)):
                raise MalformedRecordError("content part without a type", place)
    elif content is not None and not isinstance(content, str):
        raise MalformedRecordError("content is neither text nor a list of parts", place)
    elif content is None and role in ("user", "system", "developer"):
        raise MalformedRecordError("message without content", place)
    calls = message.get("tool_calls")
    if calls is not None:
        _check_tool_calls(calls, place)
    return message


def _check_tool_calls(calls: JsonValue, place: str) -> None:
    if not is_list(calls):
        raise MalformedRecordError("tool_calls is not a list", place)
    for call in calls:
        function = call.get("function", call.get("custom")) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise MalformedRecordError("tool call without a function name", place)


def _check_prompt(body: Object) -> Object:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return body
    if not is_list(prompt) or not prompt:
        raise MalformedRecordError("prompt is neither text nor token ids")
    if all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in prompt):
        return body
    if len(prompt) > 1:
        raise MalformedRecordError("prompt holds several prompts")
    return _check_prompt({**body, "prompt": prompt[0]})


def split_answer(body: Object, recorded: Object | None, kind: Kind) -> tuple[Object, Object | None]:
    """Parts a sound body and its answer.

    The answer is the recorded one; else, in a chat, the final assistant message, which leaves the body. A final
    message that the request asked to be continued (`continue_final_message`) is part of the prompt.

    Returns:
        The body without the answer, and the answer or None.
    """
    if recorded is not None or kind == "completion" or body.get("continue_final_message") is True:
        return body, recorded
    messages = cast("Sequence[Object]", body["messages"])
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        return {**body, "messages": messages[:-1]}, without_nulls(messages[-1])
    return body, None


def answer_of_response(response: Object, kind: Kind) -> Object | None:
    """The answer in the body of a chat or text completion: that of its first choice.

    Returns:
        An assistant message or `{"text"}`; None when the response holds no choice.

    Raises:
        MalformedRecordError: The choices are of another shape.
    """
    choices = response.get("choices")
    if choices is None:
        return None
    if not is_list(choices):
        raise MalformedRecordError("choices of the response is not a list")
    if not choices:
        return None
    choice = choices[0]
    if not isinstance(choice, Mapping):
        raise MalformedRecordError("choice of the response is not an object")
    if kind == "completion":
        text = choice.get("text")
        if not isinstance(text, str):
            raise MalformedRecordError("choice of the response without text")
        return {"text": text}
    return check_answer(choice.get("message"))


def is_truncated(response: Object | None) -> bool:
    """Whether the first choice of a response, sound or not, ended at its length limit."""
    choices = None if response is None else response.get("choices")
    first = choices[0] if is_list(choices) and choices else None
    return isinstance(first, Mapping) and first.get("finish_reason") == LENGTH_LIMIT


def check_answer(message: JsonValue) -> Object:
    """An assistant message, without its null fields; an absent role is `assistant`.

    Raises:
        MalformedRecordError: It is no message.
    """
    if not isinstance(message, dict):
        raise MalformedRecordError("answer is not a message")
    return without_nulls(check_message({**message, "role": message.get("role") or "assistant"}, "answer"))


def without_nulls(message: Object) -> Object:
    """The message without its null fields, which servers write for every field of the API; `content` stays."""
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def take_metadata(body: Object) -> tuple[Object, Object]:
    """Parts a body and the `reap_*` keys of its metadata.

    Returns:
        The body without those keys (without metadata if nothing else is in it), and those keys.

    Raises:
        MalformedRecordError: The metadata is not an object, or `reap_slice` breaks the rule for names of slices.
    """
    metadata = as_metadata(body.get("metadata"))
    ours = {key: value for key, value in metadata.items() if key in (SLICE_KEY, TIMESTAMP_KEY, SESSION_KEY)}
    if not ours:
        return body, {}
    name = ours.get(SLICE_KEY)
    if name is not None and not is_slice_name(name):
        raise MalformedRecordError(f"metadata.reap_slice is not {RULE}")
    rest = {key: value for key, value in metadata.items() if key not in ours}
    body = {key: value for key, value in body.items() if key != "metadata"}
    return ({**body, "metadata": rest} if rest else body), ours


def as_metadata(value: JsonValue) -> Object:
    """The metadata of a body; an empty object when absent.

    Raises:
        MalformedRecordError: It is not an object.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MalformedRecordError("metadata is not an object")
    return value


def is_list(value: JsonValue) -> TypeGuard[Sequence[JsonValue]]:
    """Whether a JSON value is an array. The parser makes lists, for which this check costs little."""
    return isinstance(value, list)
