"""Where the instrumentations of model calls put messages into a span: one reader a convention.

| convention | prompt | answer |
|---|---|---|
| GenAI | `gen_ai.input.messages`, `gen_ai.system_instructions` | `gen_ai.output.messages` |
| OpenLLMetry | `gen_ai.prompt.<i>.*` (`llm.prompts.<i>.*`) | `gen_ai.completion.<i>.*` (`llm.completions.<i>.*`) |
| OpenInference | `llm.input_messages.<i>.message.*`, `llm.prompts.<i>.prompt.text` | `llm.output_messages.<i>.*` |
| GenAI 1.28 message events | events `gen_ai.<role>.message` | events `gen_ai.choice` |
| GenAI content events | `gen_ai.prompt` | `gen_ai.completion` |
| Pydantic AI | the message events as JSON in the attribute `events` | the same |
| Vercel AI SDK | `ai.prompt.messages`, `ai.prompt.tools` | `ai.response.text`, `ai.response.toolCalls` |
| Langfuse | `langfuse.observation.input` | `langfuse.observation.output` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reap_serve.records import JsonValue
from reap_serve.traffic.body import LENGTH_LIMIT, Object, is_list
from reap_serve.traffic.formats.otel_values import Attributes, numbered
from reap_serve.traffic.json_text import as_object, decoded, structured
from reap_serve.traffic.malformed import MalformedRecordError

_MESSAGE_KEYS = frozenset(
    {
        "role",
        "content",
        "tool_calls",
        "tool_call_id",
        "function_call",
        "reasoning",
        "reasoning_content",
        "parts",
        "name",
    }
)


@dataclass(frozen=True, slots=True)
class Call:
    """What a span says of a model call.

    Attributes:
        messages: Messages of the prompt, in any form that `chats` reads; the text of a prompt.
        answers: Recorded answers; the first is read.
        tools: Definitions of tools, likewise.
        truncated: Whether the first answer ended at its length limit.
    """

    messages: JsonValue
    answers: Sequence[JsonValue]
    tools: JsonValue = None
    truncated: bool = False


def call_of(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    """The model call in a span, by the first convention that finds a prompt; None where none does.

    Args:
        attributes: Attributes of the span, names in full, values as recorded.
        events: Events of the span, each with its attributes plain.

    Raises:
        MalformedRecordError: What was found is not whole: a number is missing, JSON is broken.
    """
    for reader in _READERS:
        call = reader(attributes, events)
        if call is not None:
            return call
    return None


def _of_genai(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    given = structured(attributes.get("gen_ai.input.messages"))
    if not given:
        return None
    output = structured(attributes.get("gen_ai.output.messages"))
    answers = output if is_list(output) else [output] if output else []
    system = decoded(attributes.get("gen_ai.system_instructions"))
    if system:
        key = "content" if isinstance(system, str) else "parts"
        messages = given if is_list(given) else [given]
        given = [{"role": "system", key: system}, *messages]
    first = answers[0] if answers else None
    return Call(
        given,
        answers,
        attributes.get("gen_ai.tool.definitions"),
        isinstance(first, Mapping) and first.get("finish_reason") == LENGTH_LIMIT,
    )


def _of_numbered(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    for prompt, completion in (("gen_ai.prompt", "gen_ai.completion"), ("llm.prompts", "llm.completions")):
        given = numbered(attributes, prompt)
        if not given or not any(isinstance(item, Mapping) and _has_turn(item) for item in given):
            continue
        messages = [_numbered_message(item, "user") for item in given]
        answers = [_numbered_message(item, "assistant") for item in numbered(attributes, completion)]
        first = answers[0] if answers else {}
        functions = numbered(attributes, "llm.request.functions")
        return Call(messages, answers, functions or None, first.get("finish_reason") == LENGTH_LIMIT)
    return None


def _has_turn(item: Object) -> bool:
    return not item.keys().isdisjoint(("content", "tool_calls", "parts", "function_call"))


def _numbered_message(item: JsonValue, role: str) -> Object:
    if not isinstance(item, Mapping):
        raise MalformedRecordError("numbered attributes of a message without their names")
    message = {"role": role, **item}
    for key in ("content_filter_results", "type"):
        message.pop(key, None)
    return message


def _of_openinference(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    given = numbered(attributes, "llm.input_messages")
    tools = [_json_schema(item) for item in numbered(attributes, "llm.tools")] or None
    if given:
        answers: list[JsonValue] = [_inner_message(item) for item in numbered(attributes, "llm.output_messages")]
        return Call([_inner_message(item) for item in given], answers, tools)
    prompts = [_at(item, "prompt", "text") for item in numbered(attributes, "llm.prompts")]
    if prompts and isinstance(prompts[0], str):
        if len(prompts) > 1:
            raise MalformedRecordError("prompt holds several prompts")
        answers = [_at(item, "completion", "text") for item in numbered(attributes, "llm.choices")]
        return Call(prompts[0], answers)
    return None


def _at(item: JsonValue, *keys: str) -> JsonValue:
    for key in keys:
        item = item.get(key) if isinstance(item, Mapping) else None
    return item


def _json_schema(item: JsonValue) -> JsonValue:
    found = _at(item, "tool", "json_schema")
    if found is None:
        raise MalformedRecordError("tool without its definition")
    return found


def _inner_message(item: JsonValue) -> Object:
    message = _at(item, "message")
    if not isinstance(message, Mapping):
        raise MalformedRecordError("numbered attributes of a message without their names")
    found = {key: value for key, value in message.items() if key not in ("contents", "tool_calls")}
    contents = message.get("contents")
    if contents is not None:
        found["content"] = [_content_part(part) for part in _listed(contents)]
    calls = message.get("tool_calls")
    if calls is not None:
        found["tool_calls"] = [_at(call, "tool_call") for call in _listed(calls)]
    if "function_call_name" in found:
        name, arguments = found.pop("function_call_name"), found.pop("function_call_arguments_json", "{}")
        found["function_call"] = {"name": name, "arguments": arguments}
    return found


def _content_part(part: JsonValue) -> JsonValue:
    found = _at(part, "message_content")
    if not isinstance(found, Mapping):
        raise MalformedRecordError("content part without a type")
    if found.get("type") == "image":
        return {"type": "image_url", "image_url": {"url": _at(found, "image", "image", "url")}}
    return found


def _listed(value: JsonValue) -> Sequence[JsonValue]:
    if not is_list(value):
        raise MalformedRecordError("numbered attributes of a message without their names")
    return value


def _of_message_events(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    listed = structured(attributes.get("events"))
    found = [_plain_event(event) for event in (listed if is_list(listed) else events) if isinstance(event, Mapping)]
    messages: list[JsonValue] = []
    choices: list[tuple[int, JsonValue, JsonValue]] = []
    for name, content in found:
        if name == "gen_ai.choice":
            index, inner = content.get("index", len(choices)), content.get("message")
            if inner is None:
                inner = {key: value for key, value in content.items() if key in _MESSAGE_KEYS}
            choices.append((index if isinstance(index, int) else len(choices), inner, content.get("finish_reason")))
        elif name.startswith("gen_ai.") and name.endswith(".message"):
            message = {"role": name.removeprefix("gen_ai.").removesuffix(".message"), **content}
            if message["role"] == "tool" and "id" in message:
                message["tool_call_id"] = message.pop("id")
            messages.append({key: value for key, value in message.items() if key in _MESSAGE_KEYS})
    if not any(isinstance(message, Mapping) and _has_turn(message) for message in messages):
        return None
    choices.sort(key=lambda choice: choice[0])
    truncated = bool(choices) and choices[0][2] == LENGTH_LIMIT
    return Call(messages, [choice[1] for choice in choices], attributes.get("gen_ai.tool.definitions"), truncated)


def _plain_event(event: Object) -> tuple[str, dict[str, JsonValue]]:
    """Name and content of an event: its attributes, its body, or its own keys."""
    name = event.get("event.name", event.get("event_name", event.get("name")))
    content: dict[str, JsonValue] = {}
    for source in (event.get("attributes"), event.get("body")):
        content |= as_object(source)
    content |= as_object(content.pop("gen_ai.event.content", None))
    if not content:
        content = {key: value for key, value in event.items() if key not in ("event.name", "name", "timestamp")}
    return (name if isinstance(name, str) else ""), content


def _of_content_events(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    given = attributes.get("gen_ai.prompt")
    if not isinstance(given, (str, list)) or not given:
        return None
    completion = attributes.get("gen_ai.completion")
    answers = decoded(completion)
    return Call(
        given,
        answers if is_list(answers) else [] if completion in (None, "") else [completion],
        attributes.get("gen_ai.tool.definitions"),
    )


def _of_ai_sdk(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    given = structured(attributes.get("ai.prompt.messages"))
    if not given:
        return None
    text, calls = attributes.get("ai.response.text"), structured(attributes.get("ai.response.toolCalls"))
    if text is None:
        text = attributes.get("ai.response.object")
    answers: list[JsonValue] = []
    if text is not None or calls:
        answer: dict[str, JsonValue] = {"role": "assistant", "content": text}
        if calls:
            answer["tool_calls"] = calls
        if isinstance(reasoning := attributes.get("ai.response.reasoning"), str) and reasoning:
            answer["reasoning"] = reasoning
        answers.append(answer)
    return Call(
        given,
        answers,
        attributes.get("ai.prompt.tools"),
        attributes.get("ai.response.finishReason") == LENGTH_LIMIT,
    )


def _of_langfuse(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    given = attributes.get("langfuse.observation.input")
    if attributes.get("langfuse.observation.type") != "generation" or not given:
        return None
    output = attributes.get("langfuse.observation.output")
    return Call(given, [] if output in (None, "") else [output])


def _of_values(attributes: Attributes, events: Sequence[Object]) -> Call | None:
    """OpenInference's `input.value` of a model call, where its messages do not stand by themselves."""
    given, output = attributes.get("input.value"), attributes.get("output.value")
    if attributes.get("openinference.span.kind") != "LLM" or not given:
        return None
    return Call(given, [] if output in (None, "") else [output])


_READERS: tuple[Callable[[Attributes, Sequence[Object]], Call | None], ...] = (
    _of_genai,
    _of_openinference,
    _of_numbered,
    _of_message_events,
    _of_content_events,
    _of_ai_sdk,
    _of_langfuse,
    _of_values,
)
