"""Model calls as observability tools log them: an input, an output and parameters, each in more than one shape."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic_core import from_json

from reap_serve.records import JsonValue
from reap_serve.traffic.body import (
    Object,
    answer_of_response,
    check_answer,
    check_body,
    is_list,
    is_truncated,
    split_answer,
)
from reap_serve.traffic.fields import count, name
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Kind, Origin, Request

# Parameters of a call that shape the prompt or the answer. What else tools log beside them (keys, users, routing) is
# no part of a request.
_PARAMETERS = frozenset(
    {
        "chat_template",
        "chat_template_kwargs",
        "documents",
        "frequency_penalty",
        "function_call",
        "functions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_p",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "reasoning_effort",
        "repetition_penalty",
        "response_format",
        "seed",
        "stop",
        "temperature",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
    }
)


def decoded(value: JsonValue) -> JsonValue:
    """The JSON value inside a text, where the text is a JSON array or object; else the value itself."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            inner: JsonValue = from_json(value, allow_inf_nan=False)
        except ValueError:
            return value
        return inner
    return value


def as_object(value: JsonValue) -> Object:
    """The value where it is an object, also as JSON text; else an empty object."""
    value = decoded(value)
    return value if isinstance(value, Mapping) else {}


def body_of_input(value: JsonValue, parameters: Object, model: JsonValue) -> Object:
    """An OpenAI body from a logged input.

    Args:
        value: Messages, one message, a body with messages or a prompt, or the text of a prompt; also as JSON text.
        parameters: Logged parameters; those that shape prompt or answer are taken over.
        model: Name of the model.

    Raises:
        MalformedRecordError: The input has none of these shapes.
    """
    value = decoded(value)
    body: dict[str, JsonValue] = {"model": model} if isinstance(model, str) and model else {}
    body |= {key: item for key, item in parameters.items() if key in _PARAMETERS and item is not None}
    if isinstance(value, str):
        return {**body, "prompt": value}
    if is_list(value):
        return {**body, "messages": value}
    if isinstance(value, Mapping):
        if "messages" in value or "prompt" in value:
            kept = {key: item for key, item in value.items() if key in _PARAMETERS or key in ("messages", "prompt")}
            return {**body, **kept}
        if "role" in value:
            return {**body, "messages": [value]}
    raise MalformedRecordError("input is neither messages nor a prompt")


def answer_of_output(value: JsonValue, kind: Kind) -> Object | None:
    """The recorded answer from a logged output: a response, a message, a list of either, or text; also as JSON text.

    Raises:
        MalformedRecordError: The output has none of these shapes.
    """
    value = decoded(value)
    if is_list(value):
        value = value[0] if value else None
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return {"text": value} if kind == "completion" else {"role": "assistant", "content": value}
    if not isinstance(value, Mapping):
        raise MalformedRecordError("output is neither a message nor text")
    if "choices" in value:
        return answer_of_response(value, kind)
    if isinstance(value.get("message"), Mapping):
        value = value["message"]
    if kind == "chat":
        return check_answer(value)
    text = value.get("text", value.get("content")) if isinstance(value, Mapping) else None
    if not isinstance(text, str):
        raise MalformedRecordError("output of a completion without text")
    return {"text": text}


def request_of_call(
    body: Object | None,
    output: JsonValue,
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
    kind: Kind = "chat" if body is None or "messages" in body else "completion"
    answer = None
    if body is not None:
        body, answer = split_answer(check_body(body, kind), answer_of_output(output, kind), kind)
    elif not lengths[0]:
        raise MalformedRecordError("neither text nor a prompt length")
    return Request(
        body=body,
        kind=kind,
        slice=slice,
        origin=origin,
        answer=answer,
        truncated=answer is not None and (truncated or is_truncated(as_object(output))),
        timestamp=timestamp,
        session=name(session),
        id=name(request_id) or str(origin.line),
        prompt_tokens=lengths[0],
        output_tokens=lengths[1],
    )
