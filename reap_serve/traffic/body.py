"""OpenAI request bodies: whether one is sound, what kind it is, and where its recorded answer stands.

What other APIs and retired fields say is translated before (`chats`), and with it messages and tools are checked, since
chat templates index them; the rest of a body is passed on as it was recorded. Building the pydantic models of the
`openai` package for each line would cost more than parsing the JSON does, and would refuse the fields that vLLM adds.
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
_PLAIN_ROLES = ("user", "assistant", "system", "developer")
# The reason that OpenAI's API gives for an answer that ended at `max_tokens`.
LENGTH_LIMIT = "length"

# Endpoints of the batch API that hold no chat or completion (https://platform.openai.com/docs/api-reference/batch).
_OTHER_ENDPOINTS = ("embeddings", "moderations", "images/generations", "score", "rerank", "audio")
# Endpoints of other APIs that hold chats.
_CHAT_ENDPOINTS = ("chat/completions", "/responses", "/messages")
# Fields that only a body of the Responses API has.
_RESPONSES_KEYS = frozenset(
    {
        "background",
        "conversation",
        "include",
        "instructions",
        "max_output_tokens",
        "previous_response_id",
        "reasoning",
        "store",
        "text",
        "tools",
        "truncation",
    }
)


def kind_of_endpoint(url: str) -> Kind:
    """The kind of request that an endpoint takes; those of the Responses and the Anthropic API take chats.

    Raises:
        MalformedRecordError: The endpoint takes neither chats nor completions.
    """
    path = url.split("?", 1)[0].rstrip("/")
    if path.endswith(_CHAT_ENDPOINTS):
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
        MalformedRecordError: The body has neither `messages` nor `prompt`, and is none of the Responses API.
    """
    if "messages" in body or is_responses_body(body):
        return "chat"
    if "prompt" in body:
        return "completion"
    if "input" in body:
        raise MalformedRecordError("body of an embeddings request, or of a responses request without its marks")
    if "contents" in body:
        raise MalformedRecordError("body of a Gemini request")
    raise MalformedRecordError("body without messages or prompt")


def is_responses_body(body: Object) -> bool:
    """Whether a body is one of the Responses API; without a field of that, `input` may be what an embedding is of."""
    given = body.get("input")
    if "messages" in body or "prompt" in body or given is None:
        return False
    return not _RESPONSES_KEYS.isdisjoint(body) or (
        is_list(given) and any(isinstance(item, Mapping) and ("role" in item or "type" in item) for item in given)
    )


def check_body(body: Object, kind: Kind) -> Object:
    """The body, sound for its kind; a prompt list of one prompt becomes that prompt.

    Its messages are those of `chats.bodies.chat_body`, which has checked them.

    Raises:
        MalformedRecordError: A field that the later stages rely on is absent or of another type.
    """
    if kind == "chat":
        if not body.get("messages"):
            raise MalformedRecordError("messages is empty")
    else:
        body = _check_prompt(body)
    documents = body.get("documents")
    if documents is not None and not (is_list(documents) and all(isinstance(item, Mapping) for item in documents)):
        raise MalformedRecordError("documents is not a list of objects")
    return body


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

    Raises:
        MalformedRecordError: That message holds more than text.
    """
    if recorded is not None or kind == "completion" or body.get("continue_final_message") is True:
        return body, recorded
    messages = cast("Sequence[Object]", body["messages"])
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        kept = messages[:-1]
        if isinstance(messages, PlainMessages):
            kept = PlainMessages(kept)
        return {**body, "messages": kept}, answer_message(messages[-1])
    return body, None


def answer_message(message: Object) -> Object:
    """An assistant message as an answer: without the null fields that servers write, and its content one text.

    A model writes one text; APIs cut it into parts, at a citation for instance.

    Raises:
        MalformedRecordError: A part is no text.
    """
    found = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = found.get("content")
    if is_list(content):
        found["content"] = "".join(map(_text_of, content))
    return found


def _text_of(part: JsonValue) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise MalformedRecordError("answer that holds more than text")
    return text


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
    body = {key: value for key, value in body.items() if key != "metadata"}
    if len(ours) < len(metadata):
        body["metadata"] = {key: value for key, value in metadata.items() if key not in ours}
    return body, ours


def as_metadata(value: JsonValue) -> Object:
    """The metadata of a body; an empty object when absent.

    Raises:
        MalformedRecordError: It is not an object.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MalformedRecordError("metadata is not an object")
    return value


def is_list(value: JsonValue) -> TypeGuard[Sequence[JsonValue]]:
    """Whether a JSON value is an array. The parser makes lists, for which this check costs little."""
    return isinstance(value, list)


class PlainMessages(list[Mapping[str, JsonValue]]):
    """Messages each of which is a role and a text alone, as in most chats: nothing of them is to be searched again."""


def is_plain_message(message: JsonValue) -> TypeGuard[Mapping[str, str]]:
    """Whether a message is a role and a text alone.

    Roles are those whose messages bind nothing to others: no call, no result, no reasoning that waits for its answer.
    """
    if not isinstance(message, dict) or len(message) != 2:
        return False
    return isinstance(message.get("content"), str) and message.get("role") in _PLAIN_ROLES
