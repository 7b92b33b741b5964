"""Answers that repeat their prompt (`echo: true`): the prompt is no part of what the model wrote."""

from __future__ import annotations

from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Kind


def without_echo(body: Object, answer: Object | None, kind: Kind) -> tuple[Object, Object | None]:
    """The body without `echo`, and the answer without the prompt in front of it.

    A chat with `echo` repeats the message that it continues (`continue_final_message`).

    Raises:
        MalformedRecordError: The answer does not begin with the prompt, or the prompt is token ids, whose text is not
            known.
    """
    if "echo" not in body:
        return body, answer
    echo = body["echo"]
    body = {key: value for key, value in body.items() if key != "echo"}
    if echo is not True or answer is None:
        return body, answer
    if kind == "chat":
        return body, _without_message(body, answer)
    prompt, text = body.get("prompt"), answer.get("text")
    if not isinstance(prompt, str):
        raise MalformedRecordError("echo of a prompt of token ids")
    if not isinstance(text, str) or not text.startswith(prompt):
        raise MalformedRecordError("echo without the prompt in the answer")
    return body, {**answer, "text": text[len(prompt) :]}


def _without_message(body: Object, answer: Object) -> Object:
    messages, content = body.get("messages"), answer.get("content")
    last = messages[-1] if is_list(messages) and messages else None
    begun = last.get("content") if isinstance(last, dict) and last.get("role") == "assistant" else None
    if not isinstance(begun, str) or not isinstance(content, str) or not content.startswith(begun):
        return answer
    return {**answer, "content": content[len(begun) :]}
