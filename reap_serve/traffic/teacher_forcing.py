"""A request and its recorded answer as one sequence of tokens, by whatever renders chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from reap_serve.records import JsonValue
from reap_serve.traffic.request import Request


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

    def tokens(self, request: Request) -> ForcedTokens:
        """The tokens of a request with text."""
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
        prompt = self._renderer.render_chat(request.body, None)
        if request.answer is None:
            return ForcedTokens(prompt, len(prompt), None, request.slice)
        whole = self._renderer.render_chat(request.body, request.answer)
        tail = self._template_tail()
        if whole[: len(prompt)] != prompt or whole[len(whole) - len(tail) :] != tail:
            # A template that rewrites what came before an answer (it drops reasoning, say): append the answer's text.
            content = request.answer.get("content")
            whole = prompt + self._renderer.tokenize(content if isinstance(content, str) else "", special=False) + tail
        return ForcedTokens(whole[: len(whole) - len(tail)], len(prompt), tail[0] if tail else None, request.slice)

    def _completion_prompt(self, body: Mapping[str, JsonValue]) -> list[int]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return self._renderer.tokenize(prompt, special=True)
        assert isinstance(prompt, list)
        if prompt and isinstance(prompt[0], str):
            return self._renderer.tokenize(prompt[0], special=True)
        return [token for token in prompt if isinstance(token, int)]

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
