"""Requests as the tokens that vLLM's own chat endpoint would make of them, and what vLLM refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from reap_serve.records import JsonValue
from reap_serve.traffic.refusal import RefusedRecordError

if TYPE_CHECKING:
    from vllm import LLM


def refusing_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it does not take."""
    from vllm.exceptions import VLLMClientError

    return ValueError, VLLMClientError


class EngineRenderer:
    """Renders requests as vLLM's own chat endpoint would: template, tools and template arguments of the body.

    Args:
        llm: The engine.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        """Tokens of a chat request; see `traffic.teacher_forcing.Renderer`."""
        messages = [*cast(Sequence[Any], body["messages"]), *([dict(answer)] if answer is not None else [])]
        try:
            rendered = self._llm._preprocess_chat_one(
                messages,
                chat_template=body.get("chat_template"),
                chat_template_kwargs=body.get("chat_template_kwargs"),
                tools=body.get("tools"),
                add_generation_prompt=answer is None,
            )
        except refusing_errors() as error:
            raise RefusedRecordError(str(error)) from error
        return list(rendered["prompt_token_ids"])

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text."""
        return list(self._llm.get_tokenizer().encode(text, add_special_tokens=special)) if text else []
