"""A request and its recorded answer as one sequence of tokens, by whatever renders chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.refusal import REFUSALS, Refusals, RefusedRecordError
from reap_serve.traffic.request import Request

# What templates end a prompt with where the model is to begin with its reasoning, which then ends in `</think>`.
_OPENINGS = ("<think>\n", "<think>")


class Renderer(Protocol):
    """What turns requests into tokens: an engine's own chat rendering, in this process or over HTTP."""

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        """Tokens of a chat request: with the answer as its last message, or, without one, up to where one begins."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text, with or without the tokenizer's special tokens around it."""


@dataclass(frozen=True, slots=True)
class ForcedTokens:
    """A prompt and its answer.

    Attributes:
        token_ids: The tokens that enter the model when the answer is served.
        prompt_tokens: Where the answer begins.
        end_token: The last token that the model predicted, never an input: the one that ends the answer, or the last
            one of a truncated answer. None when there is none.
        slice: The request's slice.
        truncated: Whether the answer ended at its length limit.
    """

    token_ids: list[int]
    prompt_tokens: int
    end_token: int | None
    slice: str
    truncated: bool = False

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer as usage counts state them: with the one that ends it."""
        return len(self.token_ids) - self.prompt_tokens + (self.answered and self.end_token is not None)

    @property
    def answered(self) -> bool:
        """Whether the answer was recorded and not empty."""
        # A truncated answer of one token leaves no token that enters the model.
        return self.truncated or len(self.token_ids) > self.prompt_tokens


class TeacherForcing:
    """Joins prompts and recorded answers.

    Args:
        renderer: Renders the chats.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._tail: list[int] | None = None

    def tokens_or_refuse(self, request: Request, refusals: Refusals) -> ForcedTokens | None:
        """The tokens of a request with text; None when it is refused and records are to be skipped.

        Raises:
            TrafficError: The request is refused, and records are not to be skipped.
        """
        try:
            tokens = self.tokens(request)
            if not tokens.prompt_tokens:
                raise RefusedRecordError("the prompt is empty")
        except REFUSALS as error:
            refusals.refuse(request, error)
            return None
        return tokens

    def required_tokens(self, request: Request) -> ForcedTokens:
        """The tokens of a request with text.

        Raises:
            TrafficError: The request is refused.
        """
        tokens = self.tokens_or_refuse(request, Refusals())
        assert tokens is not None
        return tokens

    def tokens(self, request: Request) -> ForcedTokens:
        """The tokens of a request with text.

        Raises:
            RefusedRecordError: The template or the tokenizer refuses it; or another error of theirs (`REFUSALS`).
        """
        forced = self._whole(request)
        if not (request.truncated and forced.answered):
            return forced
        *entered, last = forced.token_ids
        return ForcedTokens(entered, forced.prompt_tokens, last, forced.slice, truncated=True)

    def _whole(self, request: Request) -> ForcedTokens:
        """The tokens of a request whose answer was ended by the model."""
        assert request.body is not None
        if request.kind == "completion":
            prompt = self._completion_prompt(request.body)
            text = "" if request.answer is None else str(request.answer.get("text") or "")
            answer = self._renderer.tokenize(text, special=False)
            return ForcedTokens(prompt + answer, len(prompt), None, request.slice)
        body, begun = _continued(_with_template_arguments(request.body))
        prompt = self._renderer.render_chat(body, begun)
        if begun is not None:
            prompt = self._without_tail(prompt)
        if request.answer is None:
            return ForcedTokens(prompt, len(prompt), None, request.slice)
        whole = self._renderer.render_chat(body, request.answer if begun is None else _joined(begun, request.answer))
        tail = self._template_tail()
        if whole[: len(prompt)] != prompt or whole[len(whole) - len(tail) :] != tail:
            # A template that rewrites what came before an answer (it drops reasoning, say): append the answer's text.
            whole = prompt + self._renderer.tokenize(self._written(request.answer, prompt), special=False) + tail
        return ForcedTokens(self._without_tail(whole), len(prompt), tail[0] if tail else None, request.slice)

    def _written(self, answer: Object, prompt: list[int]) -> str:
        """An answer as the model wrote it after a prompt: with its reasoning, where the prompt begins that."""
        reasoning, content = answer.get("reasoning"), _text(answer)
        if not isinstance(reasoning, str) or not reasoning:
            return content
        for opening in _OPENINGS:
            tokens = self._renderer.tokenize(opening, special=False)
            if tokens and prompt[-len(tokens) :] == tokens:
                return f"{reasoning}\n</think>\n\n{content}"
        return content

    def _completion_prompt(self, body: Mapping[str, JsonValue]) -> list[int]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return self._renderer.tokenize(prompt, special=body.get("add_special_tokens") is not False)
        assert isinstance(prompt, list)
        if prompt and isinstance(prompt[0], str):
            return self._renderer.tokenize(prompt[0], special=True)
        return [token for token in prompt if isinstance(token, int)]

    def _without_tail(self, tokens: list[int]) -> list[int]:
        return tokens[: len(tokens) - len(self._template_tail())]

    def _template_tail(self) -> list[int]:
        """What the template writes after an answer: the common end of two chats that differ in nothing but theirs."""
        if self._tail is None:
            body = {"messages": [{"role": "user", "content": "a"}]}
            one = self._renderer.render_chat(body, {"role": "assistant", "content": "b"})
            other = self._renderer.render_chat(body, {"role": "assistant", "content": "7"})
            length = 0
            while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
                length += 1
            self._tail = one[len(one) - length :]
        return self._tail


def _with_template_arguments(body: Object) -> Object:
    """The body with every template argument where a renderer looks for them, as vLLM's chat endpoint puts them there.

    Source: `ChatCompletionRequest.build_chat_params` of vLLM.
    """
    given = body.get("chat_template_kwargs")
    arguments = {**given} if isinstance(given, Mapping) else {}
    effort = body.get("reasoning_effort")
    if effort is not None:
        arguments = {"enable_thinking": effort != "none", **arguments, "reasoning_effort": effort}
    if body.get("documents") is not None:
        arguments["documents"] = body["documents"]
    return {**body, "chat_template_kwargs": arguments} if arguments else body


def _continued(body: Object) -> tuple[Object, Object | None]:
    """Parts the body and the final message that its answer continues; None where a new message begins."""
    messages = body["messages"]
    if body.get("continue_final_message") is not True or not is_list(messages):
        return body, None
    begun = messages[-1]
    assert isinstance(begun, Mapping)
    return {**body, "messages": messages[:-1]}, begun


def _joined(begun: Object, answer: Object) -> Object:
    return {**begun, **answer, "content": _text(begun) + _text(answer)}


def _text(message: Object) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
