"""Model calls as observability tools log them: an input, an output and parameters, each in more than one shape."""

from __future__ import annotations

from collections.abc import Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.answers.answer import Answered, answered_output
from reap_serve.traffic.body import Object, check_body, is_list, is_responses_body, split_answer
from reap_serve.traffic.chats.bodies import MEDIA_KEYS, chat_body, completion_body
from reap_serve.traffic.chats.tools import tool_of_message
from reap_serve.traffic.echo import without_echo
from reap_serve.traffic.fields import count, name
from reap_serve.traffic.json_text import all_texts, as_object, read_content, read_input, structured
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Kind, Origin, Request

# Parameters of a call that shape the prompt or the answer. What else tools log beside them (keys, users, routing) is
# no part of a request.
_PARAMETERS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "echo",
        "frequency_penalty",
        "function_call",
        "functions",
        "instructions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_output_tokens",
        "max_tokens",
        "min_p",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "reasoning",
        "reasoning_effort",
        "repetition_penalty",
        "response_format",
        "seed",
        "stop",
        "stop_sequences",
        "suffix",
        "system",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
    }
)


# What holds the prompt itself.
_PROMPT_KEYS = frozenset({"messages", "prompt", "input", "previous_response_id", "conversation", *MEDIA_KEYS})
_ARGUMENTS_OF_FUNCTION = frozenset({"args", "kwargs"})


def body_of_input(value: JsonValue, parameters: Object, model: JsonValue, *, is_text: bool = False) -> Object:
    """A body from a logged input, of the OpenAI chat or completions API, or still of another one.

    Args:
        value: Messages, one message, a body with messages or a prompt, or the text of a prompt; also as JSON text.
        parameters: Logged parameters; those that shape prompt or answer are taken over.
        model: Name of the model.
        is_text: The input is known to be the text of a prompt, JSON or not.

    Raises:
        MalformedRecordError: The input has none of these shapes.
    """
    body: dict[str, JsonValue] = {"model": model} if isinstance(model, str) and model else {}
    for source in (parameters, as_object(parameters.get("extra_body"))):
        body |= {key: item for key, item in source.items() if key in _PARAMETERS and item is not None}
    if not (is_text and isinstance(value, str)):
        value = read_input(value)
    if is_list(value) and len(value) == 1 and is_list(value[0]):
        # A batch of one conversation.
        value = value[0]
    if is_list(value) and all_texts(value) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return {**body, "prompt": value}
    if is_list(value):
        return _with_messages(body, value)
    if isinstance(value, Mapping):
        if value.keys() <= _ARGUMENTS_OF_FUNCTION and isinstance(value.get("kwargs"), Mapping):
            value = as_object(value["kwargs"])
        if "messages" in value or "prompt" in value or is_responses_body(value):
            kept = {key: item for key, item in value.items() if key in _PARAMETERS or key in _PROMPT_KEYS}
            named = value.get("model")
            body |= {"model": named} if isinstance(named, str) and "model" not in body else {}
            body |= kept
            return _with_messages(body, structured(kept["messages"])) if "messages" in kept else body
        if "role" in value:
            return _with_messages(body, [value])
    raise MalformedRecordError("input is neither messages nor a prompt")


def _with_messages(body: Object, value: JsonValue) -> Object:
    """A body with the messages of a log: parts that an instrumentation wrote as JSON text, and tools among them."""
    if not is_list(value) or not all(isinstance(message, Mapping) for message in value):
        return {**body, "messages": value}
    messages: list[JsonValue] = []
    tools: list[JsonValue] = []
    for message in value:
        assert isinstance(message, Mapping)
        content = message.get("content")
        if (tool := tool_of_message(message)) is not None:
            tools.append(tool)
        elif isinstance(content, str):
            messages.append({**message, "content": read_content(content, message.get("role"))})
        else:
            messages.append(message)
    return {**body, **({"tools": tools} if tools and not body.get("tools") else {}), "messages": messages}


def request_of_call(
    body: Object | None,
    output: JsonValue | Answered,
    origin: Origin,
    *,
    slice: str,
    timestamp: float | None,
    session: JsonValue,
    request_id: JsonValue,
    prompt_tokens: JsonValue,
    output_tokens: JsonValue,
    truncated: bool = False,
) -> Request:
    """The request of a logged call; without a body it has lengths only.

    `truncated` is for records that say so apart from the output.

    Raises:
        MalformedRecordError: Body or output is not sound, or there is neither text nor a prompt length.
    """
    lengths = count(prompt_tokens), count(output_tokens)
    kind: Kind = "chat" if body is None or "messages" in body or "prompt" not in body else "completion"
    answer, recorded = None, Answered()
    if body is not None:
        body = check_body(chat_body(body) if kind == "chat" else completion_body(body), kind)
        recorded = output if isinstance(output, Answered) else answered_output(output, kind)
        body, answer = without_echo(body, recorded.message, kind)
        body, answer = split_answer(body, answer, kind)
    elif not lengths[0]:
        raise MalformedRecordError("neither text nor a prompt length")
    return Request(
        body=body,
        kind=kind,
        slice=slice,
        origin=origin,
        answer=answer,
        truncated=answer is not None and (truncated or recorded.truncated),
        timestamp=timestamp,
        session=name(session),
        id=name(request_id) or str(origin.line),
        prompt_tokens=lengths[0],
        output_tokens=lengths[1] if recorded.choices == 1 else None,
        choices=recorded.choices,
        broken=recorded.broken,
    )
