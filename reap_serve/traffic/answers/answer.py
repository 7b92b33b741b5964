"""The recorded answer in what a log holds of a response: one place for every form of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from reap_serve.records import JsonValue
from reap_serve.traffic.answers.results import replies_of, sdk_message
from reap_serve.traffic.answers.stream import BrokenStreamError, assembled, events_of, is_stream
from reap_serve.traffic.body import LENGTH_LIMIT, Object, answer_message, is_list, is_plain_message
from reap_serve.traffic.chats.messages import chat_messages
from reap_serve.traffic.chats.parts import as_json
from reap_serve.traffic.json_text import read_output
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Kind

# Reasons of an end without a token that ends the answer, in the APIs that are read.
_CUT = (LENGTH_LIMIT, "max_tokens", "max_output_tokens", "MAX_TOKENS", "model_length", "abort")
_NOT_ANSWERED = ("failed", "cancelled", "queued", "in_progress")
_TEXT_KEYS = ("text", "completion", "generated_text", "output_text", "content")
# Keys that may stand beside the text of an answer that is logged as an object.
_BESIDE_TEXT = frozenset(
    {"role", "type", "finish_reason", "index", "logprobs", "stop_reason", "usage", "id", "model", "name", "annotations"}
)
_MESSAGE_KEYS = ("content", "tool_calls", "function_call", "parts", "reasoning", "reasoning_content", "refusal")


@dataclass(frozen=True, slots=True)
class Answered:
    """What a log says of an answer.

    Attributes:
        message: An assistant message, or `{"text"}` for a completion; None when there is no whole answer.
        truncated: Whether it ended at its length limit.
        choices: Answers that were given to the one prompt; the first of them is the one that is read.
        usage: The response's own token counts.
        broken: Whether an answer was begun and is not whole: a stream without one of its pieces.
    """

    message: Object | None = None
    truncated: bool = False
    choices: int = 1
    usage: Object | None = None
    broken: bool = False


NO_ANSWER = Answered()


def answered(value: JsonValue, kind: Kind) -> Answered:
    """The answer in a response, whole or streamed, of any known API.

    Args:
        value: Body of a response: choices, an object of the Responses API, a message of Anthropic's, a stored stream
            as text or as a list of its events.
        kind: What was asked.

    Raises:
        MalformedRecordError: It holds an answer in a form that is not read.
    """
    if value is None:
        return NO_ANSWER
    if is_stream(value):
        try:
            is_text = isinstance(value, str)
            value = assembled(events_of(value) if isinstance(value, str) else _mappings(value), marked=is_text)
        except BrokenStreamError:
            return Answered(broken=True)
    if not isinstance(value, dict):
        raise MalformedRecordError("response is not an object")
    given = value.get("usage")
    usage = given if isinstance(given, dict) else None
    choices = value.get("choices")
    if choices is not None:
        return _of_choices(choices, kind, usage)
    found = _of_response(value, kind)
    return found if usage is None else replace(found, usage=usage)


def answered_output(value: JsonValue, kind: Kind) -> Answered:
    """The answer in a logged output: a response, a message, a list of either, JSON that the model wrote, or text.

    Raises:
        MalformedRecordError: The output has none of these shapes.
    """
    value = read_output(value)
    if value is None or value == "":
        return NO_ANSWER
    if is_stream(value):
        return answered(value, kind)
    if isinstance(value, str):
        return Answered(_of_text(value, kind))
    if is_list(value):
        return _of_list(value, kind)
    if not isinstance(value, Mapping):
        return Answered(_of_text(as_json(value), kind))
    if not value:
        return NO_ANSWER
    if _is_response(value):
        return answered(value, kind)
    if _is_choice(value):
        return _of_choices([value], kind, None)
    inner = value.get("message")
    if isinstance(inner, Mapping) and ("role" in inner or "content" in inner):
        value = inner
    messages = value.get("messages")
    if is_list(messages) and messages and value.keys() <= {"messages"}:
        return _of_list(messages, kind)
    if "generations" in value:
        raise MalformedRecordError("generations of LangChain are not read")
    if value.get("role") in ("assistant", "model", "ai") or _is_bare_message(value):
        message = _message([{"role": "assistant", **value}])
        cut = value.get("finish_reason") in _CUT
        return Answered(_of_text(_content_text(message), kind) if kind == "completion" else message, cut)
    text = _text_beside(value)
    if text is not None:
        return Answered(_of_text(text, kind), value.get("finish_reason") in _CUT)
    if (result := sdk_message(value)) is not None:
        message = _message([result])
        return Answered(_of_text(_content_text(message), kind) if kind == "completion" else message)
    if replies := replies_of(value):
        return replace(answered_output(replies[0], kind), choices=len(replies))
    if is_list(value.get("output")) or isinstance(value.get("output"), str):
        return answered_output(value["output"], kind)
    return Answered(_of_text(as_json(value), kind))


def checked_message(message: JsonValue) -> Object:
    """An assistant message, without its null fields; an absent role is `assistant`.

    Raises:
        MalformedRecordError: It is no message, or holds no text where one is looked for.
    """
    if not isinstance(message, dict):
        raise MalformedRecordError("answer is not a message")
    # What servers write beside a text when there is nothing to write.
    found = {key: value for key, value in message.items() if value is not None and (key != "tool_calls" or value != [])}
    if found.get("role") == "assistant" and is_plain_message(found):
        return found
    return _message([{**message, "role": message.get("role") or "assistant"}])


def _of_response(response: Object, kind: Kind) -> Answered:
    """The answer in a response of another API than that of choices."""
    if response.get("status") in _NOT_ANSWERED:
        return NO_ANSWER
    output = response.get("output")
    if isinstance(output, Mapping) and isinstance(output.get("message"), Mapping):
        return Answered(checked_message(output["message"]), response.get("stopReason") in _CUT)
    if is_list(output):
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, Mapping) else None
        return Answered(_message(output), reason in _CUT) if output else NO_ANSWER
    candidates = response.get("candidates")
    if is_list(candidates) and candidates:
        first = candidates[0]
        if not isinstance(first, Mapping):
            raise MalformedRecordError("candidate of the response is not an object")
        return Answered(checked_message(first.get("content")), first.get("finishReason") in _CUT, len(candidates))
    if is_list(response.get("content")):
        message = {"role": "assistant", "content": response["content"]}
        return Answered(_message([message]), response.get("stop_reason") in _CUT)
    if (
        response
        and "error" not in response
        and not response.keys().isdisjoint(("output", "content", "text", "message"))
    ):
        raise MalformedRecordError("response without choices")
    return NO_ANSWER


def _of_choices(choices: JsonValue, kind: Kind, usage: Object | None) -> Answered:
    """The choice of index 0; without indices the first."""
    if not is_list(choices):
        raise MalformedRecordError("choices of the response is not a list")
    if not choices:
        return NO_ANSWER
    known = [choice for choice in choices if isinstance(choice, dict)]
    if len(known) != len(choices):
        raise MalformedRecordError("choice of the response is not an object")
    choice = known[0]
    if len(known) > 1:
        indices = [index for each in known if isinstance(index := each.get("index"), int)]
        if indices and len(set(indices)) != len(known):
            raise MalformedRecordError("choices of the response with equal indices or without one")
        choice = known[indices.index(min(indices))] if indices else choice
    cut = choice.get("finish_reason") in _CUT
    if kind == "completion":
        text, message = choice.get("text"), choice.get("message")
        if not isinstance(text, str) and isinstance(message, Mapping):
            text = message.get("content")
        if not isinstance(text, str):
            raise MalformedRecordError("choice of the response without text")
        return Answered({"text": text}, cut, len(known), usage)
    message = choice.get("message", choice.get("delta"))
    if message is None and isinstance(choice.get("text"), str):
        message = {"content": choice["text"]}
    return Answered(checked_message(message), cut, len(known), usage)


def _of_list(values: Sequence[JsonValue], kind: Kind) -> Answered:
    """The answer in a list: of items and of parts one answer, of messages and responses the first."""
    if not values:
        return NO_ANSWER
    first = values[0]
    if isinstance(first, Mapping) and "role" not in first and isinstance(first.get("type"), str):
        items = ("message", "reasoning", "function_call", "custom_tool_call")
        is_items = all(isinstance(item, Mapping) and item.get("type") in items for item in values)
        messages = list(values) if is_items else [{"role": "assistant", "content": list(values)}]
        return Answered(_message(messages))
    if all(map(_is_choice, values)):
        return _of_choices(values, kind, None)
    if isinstance(first, Mapping) and _is_response(first):
        return answered(first, kind)
    if isinstance(first, Mapping) and ("role" in first or _is_bare_message(first)):
        roles = [item.get("role", "assistant") if isinstance(item, Mapping) else None for item in values]
        if any(role not in ("assistant", "model", "ai") for role in roles):
            raise MalformedRecordError("output of several turns")
        found = answered_output(first, kind)
        return replace(found, choices=len(values))
    if len(values) == 1 and isinstance(first, Mapping) and _text_beside(first) is not None:
        return answered_output(first, kind)
    return Answered(_of_text(as_json(list(values)), kind))


def _message(messages: Sequence[JsonValue]) -> Object:
    """One assistant message from what is read of some.

    Raises:
        MalformedRecordError: They are no answer: several turns, or another's.
    """
    found = chat_messages(list(messages))
    if len(found) != 1 or found[0]["role"] != "assistant":
        raise MalformedRecordError("answer is not one message of the assistant" if found else "answer without text")
    return answer_message(found[0])


def _is_response(value: Object) -> bool:
    choices, output = value.get("choices"), value.get("output")
    if is_list(choices):
        return all(
            isinstance(item, Mapping) and not item.keys().isdisjoint(("message", "text", "delta")) for item in choices
        )
    if value.get("object") == "response" or (is_list(value.get("candidates")) and "role" not in value):
        return True
    if isinstance(output, Mapping) and isinstance(output.get("message"), Mapping):
        return True
    return value.get("type") == "message" and is_list(value.get("content")) and "stop_reason" in value


def _is_choice(value: JsonValue) -> bool:
    """Whether an object is a choice of a response: what was written, its number and why it ended."""
    if not isinstance(value, Mapping):
        return False
    if isinstance(value.get("message"), Mapping):
        return "index" in value or "finish_reason" in value
    return isinstance(value.get("text"), str) and "finish_reason" in value


def _is_bare_message(value: Object) -> bool:
    """Whether an object without a role is a message: its fields are those of one."""
    return not value.keys().isdisjoint(_MESSAGE_KEYS) and value.keys() <= {
        *_MESSAGE_KEYS,
        *_BESIDE_TEXT,
        "audio",
        "provider_specific_fields",
        "thinking_blocks",
    }


def _text_beside(value: Object) -> str | None:
    for key in _TEXT_KEYS:
        if isinstance(value.get(key), str) and value.keys() <= {key, *_BESIDE_TEXT}:
            return str(value[key])
    return None


def _content_text(message: Object) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise MalformedRecordError("output of a completion without text")
    return content


def _of_text(text: str, kind: Kind) -> Object:
    return {"text": text} if kind == "completion" else {"role": "assistant", "content": text}


def _mappings(values: JsonValue) -> list[Object]:
    return [item for item in values if isinstance(item, Mapping)] if is_list(values) else []
