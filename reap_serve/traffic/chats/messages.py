"""Messages of any API that logs hold, and items of the Responses API, as OpenAI chat messages.

What cannot be read is refused by name: a message whose text stands where no template looks must not pass as an empty
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, PlainMessages, is_list, is_plain_message
from reap_serve.traffic.chats.calls import Calls
from reap_serve.traffic.chats.parts import Pieces, are_openai_parts, pieces_of, text_of_parts, tool_call
from reap_serve.traffic.malformed import MalformedRecordError

# Roles of other APIs; others pass as they are, for the template to take or to refuse.
_ROLES = {
    "human": "user",
    "model": "assistant",
    "ai": "assistant",
    "aimessage": "assistant",
    "aimessagechunk": "assistant",
    "humanmessage": "user",
    "systemmessage": "system",
    "toolmessage": "tool",
    "function": "tool",
}
# Types of messages that carry no role: LangChain's.
_TYPES = {**_ROLES, **{role: role for role in ("system", "developer", "user", "assistant", "tool")}}
# Fields of an assistant message under which servers write what vLLM's chat endpoint takes as `reasoning`.
_REASONING_KEYS = ("reasoning_content", "thinking", "thinking_blocks", "reasoning_details")
# Fields that no translation is needed for; a message with these alone is OpenAI's own.
_PLAIN_KEYS = frozenset({"role", "content", "name", "tool_call_id"})
# Fields that LangChain keeps under `additional_kwargs`.
_ADDITIONAL_KEYS = ("tool_calls", "function_call", "reasoning_content", "refusal")
_CALL_ITEMS = ("function_call", "custom_tool_call")
_RESULT_ITEMS = ("function_call_output", "custom_tool_call_output")


def chat_messages(messages: JsonValue) -> list[Object]:
    """OpenAI messages from messages of any known form.

    `reasoning_content` becomes `reasoning`, as in vLLM's chat endpoint; `function_call` becomes a tool call, a message
    of the role `function` a tool message, typed parts what `parts` makes of them, items of the Responses API messages.
    A message with several tool results becomes one `tool` message a result.

    Raises:
        MalformedRecordError: It is no list of messages, or one holds no text, or what it holds is not read.
    """
    if not is_list(messages):
        raise MalformedRecordError("messages is not a list")
    if all(map(is_plain_message, messages)):
        return PlainMessages(cast("Sequence[Object]", messages))
    chat = _Chat()
    for index, message in enumerate(messages):
        chat.add(message, f"messages[{index}]")
    chat.end()
    return chat.messages


@dataclass(slots=True)
class _Chat:
    """The messages so far, and what of them is not settled yet."""

    messages: list[Object] = field(default_factory=list)
    _calls: Calls = field(default_factory=Calls)
    _reasoning: list[str] = field(default_factory=list)
    _tool_use_at: int | None = None

    def add(self, message: JsonValue, place: str) -> None:
        if not isinstance(message, dict):
            raise MalformedRecordError("message is not an object", place)
        role, content = message.get("role"), message.get("content")
        if (
            isinstance(role, str)
            and (_TYPES.get(role) == role or role.lower() not in _TYPES)
            and isinstance(content, str)
            and _PLAIN_KEYS.issuperset(message)
            and (role != "tool" or "tool_call_id" in message)
            and not self._reasoning
        ):
            self._append(message)
        elif role is None and message.get("type") is not None:
            self._add_item(message, place)
        else:
            self._add_message(message, place)

    def end(self) -> None:
        """Gives reasoning that nothing follows a message of its own."""
        if self._reasoning:
            self.messages.append({"role": "assistant", "content": None, "reasoning": "\n".join(self._reasoning)})
            self._reasoning = []

    def _append(self, message: Object) -> None:
        if message["role"] != "assistant":
            self.end()
        if self._tool_use_at == len(self.messages) - 1 and message["role"] != "tool":
            raise MalformedRecordError("tool_use without its tool_result", f"message {self._tool_use_at}")
        self.messages.append(message)

    def _add_item(self, item: Object, place: str) -> None:
        kind = item.get("type")
        if kind == "constructor" and isinstance(item.get("kwargs"), Mapping):
            # LangChain's serialised form: the class is the last of the names in `id`.
            names = item.get("id")
            kind, item = (names[-1] if is_list(names) and names else None), cast("dict[str, JsonValue]", item["kwargs"])
        if kind == "message" or (isinstance(kind, str) and kind.lower() in _TYPES):
            role = "user" if kind == "message" else _TYPES[str(kind).lower()]
            self._add_message({"role": role, **item}, place)
        elif kind == "reasoning":
            # vLLM writes the reasoning as content; OpenAI's own servers give a summary or nothing.
            given = item.get("content") or item.get("summary")
            if is_list(given):
                self._reasoning.extend(pieces_of(given, place).reasoning)
        elif kind in _CALL_ITEMS:
            call = tool_call(
                item.get("call_id", item.get("id")), item.get("name"), item.get("arguments", item.get("input"))
            )
            self._add_call(self._calls.identified(call, place))
        elif kind in _RESULT_ITEMS:
            content = text_of_parts(item.get("output", ""), place)
            result: Object = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            self._append(self._calls.answered(result))
        else:
            raise MalformedRecordError(
                "item that is neither message, reasoning, nor call or result of a function", place
            )

    def _add_call(self, call: Object) -> None:
        """Adds a call of its own to the assistant's message before it, or as a message."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "assistant" and not self._reasoning:
            calls = last.get("tool_calls")
            self.messages[-1] = {**last, "tool_calls": [*(calls if is_list(calls) else []), call]}
        else:
            self._append(self._with_reasoning({"role": "assistant", "content": None, "tool_calls": [call]}))

    def _with_reasoning(self, message: dict[str, JsonValue]) -> Object:
        if self._reasoning and message["role"] == "assistant":
            message["reasoning"] = "\n".join(self._reasoning)
            self._reasoning = []
        return message

    def _add_message(self, given: Object, place: str) -> None:
        message = {**given}
        if "type" in message:
            # An item of the Responses API, or a message of LangChain's.
            message = {key: value for key, value in message.items() if key not in ("type", "id", "status")}
        if self._take_channel(message, place):
            return
        # GenAI spans and some servers say it in the message: it is no part of one.
        for key in ("finish_reason", "provider_specific_fields"):
            message.pop(key, None)
        additional = message.pop("additional_kwargs", None)
        if isinstance(additional, Mapping):
            message |= {
                key: additional[key] for key in _ADDITIONAL_KEYS if additional.get(key) and not message.get(key)
            }
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise MalformedRecordError("message without a role", place)
        message["role"] = role = _TYPES.get(role.lower(), role)
        pieces = self._take_pieces(message, place)
        _take_reasoning(message, pieces, place)
        self._calls.take(message, pieces, place)
        if pieces.results:
            # What a user says beside the results follows them.
            for result in pieces.results:
                self._append(self._calls.answered(result))
            if message["content"] is None and not pieces.calls:
                return
        if role == "tool":
            message = self._calls.answered(message)
        if "tool_calls" in message:
            message.setdefault("content", None)
        elif message.get("content") is None:
            if message.get("reasoning") is None or role != "assistant":
                refusal = message.get("refusal")
                if not isinstance(refusal, str) or role != "assistant":
                    raise MalformedRecordError("message without content", _text_key(given, place))
                message["content"] = refusal
                del message["refusal"]
            else:
                message["content"] = None
        if pieces.from_tool_use:
            self._tool_use_at = len(self.messages)
        self._append(self._with_reasoning(message))

    def _take_channel(self, message: dict[str, JsonValue], place: str) -> bool:
        """Takes a message of Harmony's `analysis` channel, which is the reasoning before what follows it."""
        channel = message.get("channel")
        if channel not in ("analysis", "commentary", "final"):
            return False
        del message["channel"]
        if channel == "analysis":
            self._reasoning.append(text_of_parts(message.get("content", ""), place))
        elif channel == "commentary":
            raise MalformedRecordError("message of the commentary channel", place)
        return channel == "analysis"

    def _take_pieces(self, message: dict[str, JsonValue], place: str) -> Pieces:
        """Replaces the message's parts by what they hold."""
        content, parts = message.get("content"), message.get("parts")
        if isinstance(content, Mapping):
            inner = content.get("parts")
            content = inner if is_list(inner) else [content]
        if is_list(parts) and parts:
            pieces = pieces_of(parts, place)
            del message["parts"]
            if content in (None, "", []):
                message["content"] = pieces.joined_content()
                return pieces
            if pieces.joined_content() != content or pieces.calls or pieces.results:
                raise MalformedRecordError("message with both content and parts", place)
            return pieces
        if parts is not None and not is_list(parts):
            raise MalformedRecordError("parts is not a list", place)
        message.pop("parts", None)
        if is_list(content) and not are_openai_parts(content):
            pieces = pieces_of(content, place)
            message["content"] = pieces.joined_content()
            return pieces
        if isinstance(message.get("content"), Mapping):
            message["content"] = content
        elif content is not None and not is_list(content) and not isinstance(content, str):
            raise MalformedRecordError("content is neither text nor a list of parts", place)
        return Pieces()


def _take_reasoning(message: dict[str, JsonValue], pieces: Pieces, place: str) -> None:
    given = message.get("reasoning")
    for key in _REASONING_KEYS:
        other = message.pop(key, None)
        if given in (None, "") and other:
            if is_list(other):
                blocks = key == "thinking_blocks"
                other = "".join(pieces_of(other, place).reasoning) if blocks else _detailed(other, place)
            given = other
    if given in (None, "") and pieces.reasoning:
        given = "\n".join(pieces.reasoning)
    if given is not None and not isinstance(given, str):
        raise MalformedRecordError("reasoning is not text", place)
    if given is not None:
        message["reasoning"] = given
    else:
        message.pop("reasoning", None)


def _detailed(details: Sequence[JsonValue], place: str) -> str | None:
    """The reasoning in OpenRouter's details of it: texts, or summaries where there are no texts."""
    found: list[str] = []
    for detail in details:
        if isinstance(detail, Mapping):
            text = detail.get("text") or detail.get("summary")
            found += [text] if isinstance(text, str) else []
    if details and not found:
        raise MalformedRecordError("thinking that its provider encrypted", place)
    return "".join(found)


_TEXT_KEYS = (
    "text",
    "completion",
    "output",
    "value",
    "message",
    "body",
    "response",
    "data",
    "result",
    "audio",
    "delta",
)


def _text_key(message: Object, place: str) -> str:
    """The place, with the key of a message's text where one is known for it."""
    found = [key for key in _TEXT_KEYS if message.get(key)]
    return f"{place}, {found[0]} is not read" if found else place
