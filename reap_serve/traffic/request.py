"""One recorded request: what was asked, what was answered, when, and for whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from reap_serve.records import JsonValue

Kind = Literal["chat", "completion"]

DEFAULT_SLICE = "default"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request was read.

    Attributes:
        source: Path as it was given; `-` is standard input.
        format: Name of the format, a key of `traffic.formats.FORMATS`.
        line: Line on which the record begins, from 1.
    """

    source: str
    format: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Request:
    """A recorded request.

    Attributes:
        body: Body of an OpenAI chat or completions request, without the recorded answer and without the
            `reap_*` keys of its metadata. None when the trace holds lengths only.
        kind: `chat` (the body has `messages`) or `completion` (the body has `prompt`).
        slice: Part of the traffic it belongs to.
        origin: Where it was read.
        answer: Recorded answer: an assistant message `{"role", "content", "tool_calls"?...}` for `chat`,
            `{"text"}` for `completion`. None when it was not recorded.
        truncated: Whether the answer ended at its length limit: no token that ends it was generated after it.
        timestamp: Arrival in seconds. The zero is the trace's own: only differences within a source have a meaning.
        session: Conversation that the request belongs to, as its source names it.
        id: `custom_id` or another name that the source gives; else its line number.
        prompt_tokens: Recorded length of the prompt, in tokens of the recorded model.
        output_tokens: Recorded length of the answer, in tokens of the recorded model.
        choices: Answers that were given to the prompt; the first of them is the one that is read.
        broken: Whether an answer was begun and not recorded whole.
        block_ids: Ids of the blocks of 512 tokens that a prompt without text consisted of; equal ids were equal text.
    """

    body: Mapping[str, JsonValue] | None
    kind: Kind
    slice: str
    origin: Origin
    answer: Mapping[str, JsonValue] | None = None
    truncated: bool = False
    timestamp: float | None = None
    session: str | None = None
    id: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    choices: int = 1
    broken: bool = False
    block_ids: tuple[int, ...] | None = None

    @property
    def has_text(self) -> bool:
        """Whether the prompt itself was recorded, not just its length."""
        return self.body is not None

    @property
    def line(self) -> int:
        """Line on which the record begins, from 1."""
        return self.origin.line
