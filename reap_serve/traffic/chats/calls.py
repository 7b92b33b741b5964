"""Tool calls of any form as OpenAI's, and which call a result belongs to."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.chats.parts import Pieces, as_json, tool_call
from reap_serve.traffic.json_text import decoded, structured
from reap_serve.traffic.malformed import MalformedRecordError


@dataclass(slots=True)
class Calls:
    """The calls of a chat that have no result yet, and how many ids were made for calls without one."""

    _unanswered: deque[str] = field(default_factory=deque)
    _made_ids: int = 0

    def take(self, message: dict[str, JsonValue], pieces: Pieces, place: str) -> None:
        """Puts the calls of a message and of its parts under `tool_calls`, each with an id.

        Raises:
            MalformedRecordError: Calls are of no form that is known.
        """
        calls = structured(message.pop("tool_calls", None))
        found: list[Object] = list(pieces.calls)
        if calls is not None and not is_list(calls):
            raise MalformedRecordError("tool_calls is not a list", place)
        found += [_chat_call(decoded(call), place) for call in calls or ()]
        called = structured(message.pop("function_call", None))
        if isinstance(called, Mapping) and called:
            call = tool_call(None, called.get("name"), called.get("arguments"))
            # Clients write both forms of one call.
            if call["function"] not in [item.get("function") for item in found]:
                found.append(call)
        elif called not in (None, {}):
            raise MalformedRecordError("function_call is not an object", place)
        if found:
            message["tool_calls"] = [self.identified(call, place) for call in found]

    def identified(self, call: Object, place: str) -> Object:
        """A call with an id, its own or a made one; its result is awaited from here on.

        Raises:
            MalformedRecordError: It names no function.
        """
        function = call.get("function", call.get("custom"))
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise MalformedRecordError("tool call without a function name", place)
        given = call.get("id")
        if given is None:
            given = f"call_{self._made_ids}"
            self._made_ids += 1
            call = {"id": given, **{key: value for key, value in call.items() if key != "id"}}
        self._unanswered.append(str(given))
        return call

    def answered(self, result: Object) -> dict[str, JsonValue]:
        """A tool message with the id of its call: its own, else that of the first call without a result."""
        message = {**result}
        given = message.get("tool_call_id")
        if given is None and isinstance(message.get("id"), str) and message["id"] in self._unanswered:
            given = message["id"]
        if given is None and self._unanswered:
            given = self._unanswered[0]
        if given is not None:
            message["tool_call_id"] = given
            if str(given) in self._unanswered:
                self._unanswered.remove(str(given))
        return message


def _chat_call(call: JsonValue, place: str) -> Object:
    """An OpenAI tool call from one in its own form, or in LangChain's or the AI SDK's."""
    if not isinstance(call, Mapping):
        raise MalformedRecordError("tool call without a function name", place)
    function = call.get("function")
    if isinstance(function, Mapping):
        found = call if "type" in call else {"type": "function", **call}
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            return found
        return {**found, "function": {**function, "arguments": "{}" if arguments is None else as_json(arguments)}}
    if isinstance(call.get("custom"), Mapping):
        return call
    return tool_call(
        next((call[key] for key in ("id", "toolCallId", "tool_call_id", "call_id") if call.get(key)), None),
        next((call[key] for key in ("name", "toolName", "tool_name") if call.get(key)), None),
        next((call[key] for key in ("arguments", "args", "input") if call.get(key) is not None), None),
    )
