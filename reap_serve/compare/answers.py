"""What greedy answers look like: loops, length, emptiness, language, form; and where two models part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reap_serve.compare.language import language_of
from reap_serve.compare.validity import ToolCall, asks_for_tool, calls_in_text, json_valid, tool_calls_valid
from reap_serve.traffic.request import Request

LOOP_MAX_PERIOD = 64
LOOP_MIN_REPEATS = 4
LOOP_MIN_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer.

    Attributes:
        token_ids: Its tokens.
        text: Its text, without special tokens.
        finish_reason: As the engine gives it: `stop`, `length`, or `repetition` where it looks for that.
        tool_calls: As the endpoint's own parser found them; None where it has none.
    """

    token_ids: list[int]
    text: str = ""
    finish_reason: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """What is wrong with an answer.

    Attributes:
        loops: It ends in a loop.
        length_limited: It was cut at its longest length.
        empty: It has neither text nor a tool call.
        language_switched: Its language is not the recorded answer's; None where one of them is not known.
        json_valid: It is the JSON that was asked for; None where none was.
        tool_calls_valid: It calls tools as the request defines them; None where no call was to be expected.
    """

    loops: bool
    length_limited: bool
    empty: bool
    language_switched: bool | None
    json_valid: bool | None
    tool_calls_valid: bool | None


def loops(token_ids: Sequence[int]) -> bool:
    """Whether an answer ends in a loop: a period of at most 64 tokens, 4 times at least and over at least 32 tokens."""
    tokens = np.asarray(token_ids)
    for period in range(1, LOOP_MAX_PERIOD + 1):
        span = max(LOOP_MIN_REPEATS * period, LOOP_MIN_TOKENS)
        if span > tokens.shape[0]:
            return False
        tail = tokens[-span:]
        if np.array_equal(tail[period:], tail[:-period]):
            return True
    return False


def judge(answer: Answer, request: Request) -> Judged:
    """What is wrong with an answer to a request."""
    body = request.body or {}
    calls = calls_in_text(answer.text) if answer.tool_calls is None else list(answer.tool_calls)
    return Judged(
        loops=answer.finish_reason == "repetition" or loops(answer.token_ids),
        length_limited=answer.finish_reason == "length",
        empty=not answer.text.strip() and not calls,
        language_switched=_switched(_recorded_text(request), answer.text),
        json_valid=json_valid(answer.text, body),
        tool_calls_valid=tool_calls_valid(calls, body) if asks_for_tool(body, request.answer) else None,
    )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before two answers part; the length of both where they are the same."""
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length


def _recorded_text(request: Request) -> str:
    answer = request.answer or {}
    text = answer.get("content") if request.kind == "chat" else answer.get("text")
    return text if isinstance(text, str) else ""


def _switched(recorded: str, answered: str) -> bool | None:
    before, after = language_of(recorded), language_of(answered)
    return None if before is None or after is None else before != after
