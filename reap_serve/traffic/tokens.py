"""How long requests are: in tokens of a tokenizer, or estimated from their characters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from reap_serve.errors import InputFileError, RequestError
from reap_serve.model import require_utf8_path
from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, PlainMessages, is_list, is_plain_message
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.own_template import TemplateSandbox
from reap_serve.traffic.refusal import Refusals, RefusedRecordError, shown_reason
from reap_serve.traffic.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Length:
    """Length of a request.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        output_tokens: Tokens of the recorded answer; 0 without one.
    """

    prompt_tokens: int
    output_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.output_tokens


class TokenCounter(Protocol):
    """Measures requests."""

    @property
    def unit(self) -> str:
        """What a count is of, to stand beside it in a report."""

    @property
    def estimated(self) -> bool:
        """Whether counts are estimates, right within a factor of two or so."""

    def __call__(self, request: Request) -> Length:
        """Length of a request; that of a request without text is the recorded one."""


class CharacterCounter:
    """Estimates tokens as ceil(characters / 4), without template: cheap, and right within a factor of two or so."""

    unit = f"characters/{CHARACTERS_PER_TOKEN}"
    estimated = True

    def __call__(self, request: Request) -> Length:
        """Estimated length of a request."""
        if request.body is None:
            return recorded_length(request)
        prompt = sum(map(len, _prompt_texts(request.body)))
        if is_plain_message(request.answer):
            answer = len(request.answer["content"])
        else:
            answer = sum(map(len, _message_texts(request.answer)))
        return Length(-(-prompt // CHARACTERS_PER_TOKEN), -(-answer // CHARACTERS_PER_TOKEN))


class TokenizerCounter:
    """Counts tokens of a model's tokenizer, chats through its chat template.

    Messages are put before the template as vLLM puts them: see `_as_rendered`.

    Args:
        model: Local directory or hub id.

    Raises:
        RequestError: The transformers package is not installed.
        InputFileError: The model's tokenizer cannot be loaded.
    """

    estimated = False

    def __init__(self, model: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise RequestError(
                "counting with a tokenizer needs the transformers package", "pip install transformers"
            ) from None
        require_utf8_path(Path(model))
        try:
            self._tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(model))
        except (OSError, ValueError) as error:
            raise InputFileError(f"{model}: its tokenizer cannot be loaded: {error}", "check the model") from None
        self.unit = f"tokens of {model}"
        special = self._tokenizer.special_tokens_map
        self._sandbox = TemplateSandbox({name: str(token) for name, token in special.items()})

    def __call__(self, request: Request) -> Length:
        """Length of a request.

        Raises:
            RefusedRecordError: The chat template refuses the messages.
        """
        if request.body is None:
            return recorded_length(request)
        try:
            request = self._sandbox.settle(request)
        except MalformedRecordError as error:
            raise RefusedRecordError(str(error)) from None
        assert request.body is not None
        if request.kind == "chat" and self._tokenizer.chat_template:
            return self._chat_length(request, request.body)
        prompt = request.body.get("prompt")
        prompt_tokens = len(prompt) if is_list(prompt) else sum(map(self._count, _prompt_texts(request.body)))
        answer_tokens = 0 if request.answer is None else sum(map(self._count, _message_texts(request.answer)))
        return Length(prompt_tokens, answer_tokens)

    def _chat_length(self, request: Request, body: Object) -> Length:
        messages = cast("Sequence[Object]", body["messages"])
        prompt_tokens = self._rendered(request, messages, add_generation_prompt=True)
        if request.answer is None:
            return Length(prompt_tokens, 0)
        whole_tokens = self._rendered(request, [*messages, request.answer], add_generation_prompt=False)
        return Length(prompt_tokens, max(whole_tokens - prompt_tokens, 0))

    def _rendered(self, request: Request, messages: Sequence[Object], *, add_generation_prompt: bool) -> int:
        from jinja2 import TemplateError

        body = request.body or {}
        arguments = body.get("chat_template_kwargs")
        try:
            text = self._tokenizer.apply_chat_template(
                [_as_rendered(message) for message in messages],
                tools=body.get("tools") or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(arguments if isinstance(arguments, Mapping) else {}),
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RefusedRecordError(shown_reason(error, request)) from None
        return self._count(str(text))

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))


def token_counter(tokenizer: str | None) -> TokenCounter:
    """The counter for `--tokenizer`: that of the model, or the estimate by characters."""
    return CharacterCounter() if tokenizer is None else TokenizerCounter(tokenizer)


def measurable(requests: Iterable[Request], counter: TokenCounter, refusals: Refusals) -> Iterator[Request]:
    """The requests that the counter's chat template takes.

    Raises:
        TrafficError: It refuses one, and records are not to be skipped.
    """
    for request in requests:
        try:
            counter(request)
        except RefusedRecordError as error:
            refusals.refuse(request, error)
        else:
            yield request


def _as_rendered(message: Object) -> dict[str, JsonValue]:
    """A message as vLLM gives it to a template: text as text, arguments as objects, reasoning under both its names.

    Source: `_parse_chat_message_content` and `_postprocess_messages` of vLLM.
    """
    found = {**message}
    content = found.get("content")
    if content is None:
        found["content"] = ""
    elif is_list(content) and all(isinstance(part, str) or _is_text(part) for part in content):
        found["content"] = "\n".join(part if isinstance(part, str) else _part_text(part) for part in content)
    if found.get("reasoning") is not None:
        found["reasoning_content"] = found["reasoning"]
    calls = found.get("tool_calls")
    if is_list(calls):
        found["tool_calls"] = [_with_object(call) for call in calls]
    return found


def _is_text(part: JsonValue) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text"


def _part_text(part: JsonValue) -> str:
    return str(part.get("text", "")) if isinstance(part, Mapping) else ""


def _with_object(call: JsonValue) -> JsonValue:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": json.loads(arguments) if arguments else {}}}


def recorded_length(request: Request) -> Length:
    """Length of a request as its source recorded it."""
    return Length(request.prompt_tokens or 0, request.output_tokens or 0)


def _prompt_texts(body: Object) -> list[str]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if is_list(prompt):
        # Token ids: as many characters as the estimate divides by.
        return [" " * CHARACTERS_PER_TOKEN] * len(prompt)
    messages = body.get("messages")
    if isinstance(messages, PlainMessages):
        texts = [str(message["content"]) for message in messages]
    else:
        texts = [text for message in messages for text in _message_texts(message)] if is_list(messages) else []
    tools = body.get("tools")
    return [*texts, json.dumps(tools, ensure_ascii=False)] if tools else texts


def _message_texts(message: JsonValue) -> list[str]:
    """The texts in a message or an answer that a model reads or writes."""
    if not isinstance(message, dict):
        return []
    texts: list[str] = []
    content = message.get("content")
    if isinstance(content, str):
        texts.append(content)
    elif is_list(content):
        texts += [item for part in content if isinstance(part, dict) and isinstance(item := part.get("text"), str)]
    texts += [item for key in ("text", "reasoning") if isinstance(item := message.get(key), str)]
    calls = message.get("tool_calls")
    return [*texts, json.dumps(calls, ensure_ascii=False)] if calls else texts
