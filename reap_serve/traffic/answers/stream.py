"""A stored stream as the response that it stands for: chunks of chats and completions, events of other APIs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pydantic_core import from_json

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list

# Fields of a message whose pieces are joined in the order of the stream.
_TEXT_FIELDS = ("content", "reasoning", "reasoning_content", "refusal")
_ANTHROPIC_EVENTS = (
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
    "ping",
    "error",
)
# Server-sent text, perhaps behind comments, with which proxies keep a connection open.
_STREAM = re.compile(r"(?:\s|:[^\n]*\n|(?:id|retry):[^\n]*\n)*(?:data: ?\{|event: )")
_ENDED_RESPONSES = ("response.completed", "response.incomplete")


class BrokenStreamError(Exception):
    """A stream that holds no whole answer; the message quotes nothing of it."""


def events_of(text: str) -> Iterator[Object]:
    """The events of server-sent text.

    Raises:
        BrokenStreamError: An event is not JSON, or the stream has no end.
    """
    ended = named = False
    # Not by `splitlines`: text holds other line breaks, such as U+2028.
    for line in text.split("\n"):
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            ended = True
            continue
        try:
            event = from_json(data, allow_inf_nan=False)
        except ValueError:
            raise BrokenStreamError("event of the stream is not JSON") from None
        if not isinstance(event, Mapping):
            raise BrokenStreamError("event of the stream is not a JSON object")
        # Events of the Responses and Anthropic APIs say their kind, and that they end, themselves.
        named = named or ("choices" not in event and "type" in event)
        yield event
    if not ended and not named:
        raise BrokenStreamError("stream broke off")


def is_stream(value: JsonValue) -> bool:
    """Whether a recorded response is a stream: server-sent text, or a list of its events."""
    if isinstance(value, str):
        return _STREAM.match(value) is not None
    return is_list(value) and bool(value) and all(_is_event(item) for item in value)


def _is_event(value: JsonValue) -> bool:
    if not isinstance(value, Mapping):
        return False
    kind, name = value.get("object"), value.get("type")
    if isinstance(kind, str) and (kind.endswith(".chunk") or kind == "text_completion"):
        return True
    choices = value.get("choices")
    if is_list(choices) and any(isinstance(item, Mapping) and "delta" in item for item in choices):
        return True
    return isinstance(name, str) and (name.startswith("response.") or name in _ANTHROPIC_EVENTS)


def assembled(events: Iterable[Object], *, marked: bool = False) -> Object:
    """The response that a stream's events stand for: every choice, usage, and why each ended.

    Args:
        events: The events.
        marked: Whether the end of the stream was marked by `[DONE]`; then its server may not have said why it ended.

    Raises:
        BrokenStreamError: It holds an error, or a piece of it is missing: a choice has no end, an event or a tool call
            lacks what must stand before it.
    """
    stream = _Stream()
    for event in events:
        stream.add(event)
    return stream.response(marked)


@dataclass(slots=True)
class _Choice:
    message: dict[str, JsonValue] = field(default_factory=lambda: {"role": "assistant", "content": None})
    calls: dict[int, dict[str, JsonValue]] = field(default_factory=dict)
    text: str | None = None
    is_chat: bool = False
    finish_reason: JsonValue = None

    def add(self, piece: Object) -> None:
        if piece.get("finish_reason") is not None:
            self.finish_reason = piece["finish_reason"]
        if isinstance(text := piece.get("text"), str):
            self.text = (self.text or "") + text
        delta = piece.get("delta", piece.get("message"))
        if isinstance(delta, Mapping):
            self.is_chat = True
            self._extend(delta)

    def _extend(self, delta: Object) -> None:
        for key in _TEXT_FIELDS:
            if isinstance(piece := delta.get(key), str):
                self.message[key] = f"{self.message.get(key) or ''}{piece}"
        called = delta.get("function_call")
        if isinstance(called, Mapping):
            self._extend_call(0, {"function": called})
        for position, call in enumerate(_objects(delta.get("tool_calls"))):
            index = call.get("index", position)
            if not isinstance(index, int):
                raise BrokenStreamError("tool call without an index")
            self._extend_call(index, call)

    def _extend_call(self, index: int, call: Object) -> None:
        known = self.calls.setdefault(
            index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        )
        if call.get("id") is not None:
            known["id"] = call["id"]
        given, function = call.get("function"), known["function"]
        if isinstance(given, Mapping) and isinstance(function, Mapping):
            known["function"] = {
                "name": given.get("name") or function["name"],
                "arguments": f"{function['arguments']}{given.get('arguments') or ''}",
            }

    def whole(self, index: int) -> Object:
        found: dict[str, JsonValue] = {"index": index}
        if self.finish_reason is not None:
            found["finish_reason"] = self.finish_reason
        if self.is_chat:
            if sorted(self.calls) != list(range(len(self.calls))):
                raise BrokenStreamError("stream without a piece of a tool call")
            calls = [self.calls[number] for number in sorted(self.calls)]
            if any(isinstance(call["function"], Mapping) and not call["function"]["name"] for call in calls):
                raise BrokenStreamError("stream without a piece of a tool call")
            found["message"] = self.message | ({"tool_calls": calls} if calls else {})
        else:
            found["text"] = self.text or ""
        return found


@dataclass(slots=True)
class _Stream:
    choices: dict[int, _Choice] = field(default_factory=dict)
    whole: dict[str, JsonValue] = field(default_factory=dict)
    _blocks: dict[int, dict[str, JsonValue]] = field(default_factory=dict)
    _message: dict[str, JsonValue] | None = None
    _named: bool = False
    _ended: Object | None = None

    def add(self, event: Object) -> None:
        if event.get("error") is not None or event.get("type") == "error":
            raise BrokenStreamError("stream with an error")
        if "choices" in event:
            self.whole |= {key: event[key] for key in ("id", "usage") if event.get(key) is not None}
            for piece in _objects(event.get("choices")):
                index = piece.get("index", 0)
                if isinstance(index, int):
                    self.choices.setdefault(index, _Choice()).add(piece)
        elif isinstance(kind := event.get("type"), str):
            self._named = True
            if kind in _ENDED_RESPONSES:
                response = event.get("response")
                self._ended = response if isinstance(response, Mapping) else None
            elif not kind.startswith("response."):
                self._add_anthropic(kind, event)

    def _add_anthropic(self, kind: str, event: Object) -> None:
        if kind == "message_start" and isinstance(message := event.get("message"), Mapping):
            self._message = {**message}
        elif kind == "content_block_start" and isinstance(block := event.get("content_block"), Mapping):
            self._blocks[self._index(event)] = {**block}
        elif kind == "content_block_delta" and isinstance(delta := event.get("delta"), Mapping):
            block = self._blocks.get(self._index(event))
            if block is None:
                raise BrokenStreamError("stream without the start of a block")
            for key in ("text", "thinking"):
                if isinstance(piece := delta.get(key), str):
                    block[key] = f"{block.get(key) or ''}{piece}"
            if isinstance(piece := delta.get("partial_json"), str):
                so_far = block.get("input")
                block["input"] = f"{so_far if isinstance(so_far, str) else ''}{piece}"
        elif kind == "message_delta" and self._message is not None:
            delta, usage, known = event.get("delta"), event.get("usage"), self._message.get("usage")
            self._message |= delta if isinstance(delta, Mapping) else {}
            if isinstance(usage, Mapping):
                self._message["usage"] = {**(known if isinstance(known, Mapping) else {}), **usage}
        elif kind == "message_stop" and self._message is not None:
            if sorted(self._blocks) != list(range(len(self._blocks))):
                raise BrokenStreamError("stream without one of its blocks")
            self._ended = {**self._message, "content": [self._blocks[index] for index in sorted(self._blocks)]}

    def _index(self, event: Object) -> int:
        index = event.get("index", 0)
        if not isinstance(index, int):
            raise BrokenStreamError("block without an index")
        return index

    def response(self, marked: bool) -> Object:
        if self._named:
            if self._ended is None:
                raise BrokenStreamError("stream broke off")
            return self._ended
        if not self.choices:
            raise BrokenStreamError("stream without a choice")
        reasons = [choice.finish_reason is not None for choice in self.choices.values()]
        if not all(reasons) and (any(reasons) or not marked):
            raise BrokenStreamError("stream broke off")
        return {**self.whole, "choices": [self.choices[index].whole(index) for index in sorted(self.choices)]}


def _objects(value: JsonValue) -> Iterator[Object]:
    for item in value if is_list(value) else ():
        if isinstance(item, Mapping):
            yield item
