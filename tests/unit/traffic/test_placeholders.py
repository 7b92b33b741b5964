"""What loggers put in place of text, and text that talks of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic_records import ASSISTANT, CALL, SAY, USER, batch, observation, read_records, span

from reap_serve.traffic.placeholders import REASON, hold_placeholder, is_cut, is_placeholder

PLACEHOLDERS = [
    "[REDACTED]",
    "<REDACTED>",
    "__REDACTED__",
    "redacted-by-litellm",
    "[content redacted for privacy]",
    "<truncated due to size exceeding limit>",
    "truncated due to size",
    "[Content truncated]",
    "[1234 characters truncated]",
    "(content not captured)",
    "***",
    "... truncated",
]
SHORTENED = [
    "The stone bri... (litellm_truncated 1234 chars) ...is the oldest.",
    "The stone bri...[truncated]",
    "The stone bri… [truncated]",
    "The stone bri (truncated)",
    "The stone bri...<truncated>",
    "The stone bri [... 1234 chars omitted ...] oldest",
    "The stone bri...[+1234 chars]",
    "The stone bri [512 more characters]",
    "The stone bri [truncated, 5120 chars total]",
    "Here: @@@langfuseMedia:type=image/png|id=x|source=base64@@@",
    "The password is [Scrubbed due to 'password']",
]
TEXTS = [
    "Why does the log say [truncated] there?",
    "What does [REDACTED] mean?",
    "Redacted documents are common in law.",
    "The list was truncated.",
    "[INST] Which bridge? [/INST]",
    "Hello...",
    "...",
    "A file of (1,024 bytes)",
    "Output truncated: see the file",
    "*hidden*",
    "Use (x - truncated mean) here.",
    "The name was redacted from the file [3]",
    "The message was removed.",
    "content",
]


@pytest.mark.parametrize("text", [*PLACEHOLDERS, *SHORTENED])
def test_placeholders_are_told(text: str) -> None:
    assert is_placeholder(text)
    assert is_placeholder(f"  {text}\n")


@pytest.mark.parametrize("text", TEXTS)
def test_text_about_them_is_text(text: str) -> None:
    assert not is_placeholder(text)


@settings(deadline=None)
@given(before=st.text(max_size=2000), mark=st.sampled_from(["...[truncated]", " (litellm_truncated 9 chars) "]))
def test_marks_are_told_in_texts_of_any_length(before: str, mark: str) -> None:
    assert is_placeholder(before + mark)


@settings(deadline=None)
@given(
    texts=st.lists(
        st.lists(
            st.sampled_from([*PLACEHOLDERS, *SHORTENED, *TEXTS, " ", "\n", "...", "x" * 240, ")"]), max_size=3
        ).map("".join),
        max_size=4,
    )
)
def test_all_texts_at_once_are_told_as_each_alone(texts: list[str]) -> None:
    assert hold_placeholder(texts) == any(map(is_placeholder, texts))


@pytest.mark.parametrize("mark", ["[REDACTED]", "<truncated due to size exceeding limit>"])
@pytest.mark.parametrize("place", ["user", "part", "history", "tool", "arguments", "reasoning", "answer"])
def test_they_are_told_in_every_text(place: str, mark: str, tmp_path: Path) -> None:
    messages: list[object] = [USER]
    answer: dict[str, object] = dict(ASSISTANT)
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    match place:
        case "user":
            messages = [{"role": "user", "content": mark}]
        case "part":
            messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": mark}]}]
        case "history":
            messages = [USER, {"role": "assistant", "content": mark}, USER]
        case "tool":
            messages = [USER, called, {"role": "tool", "tool_call_id": "c1", "content": mark}]
        case "arguments":
            call = {**CALL, "function": {"name": "look_up", "arguments": mark}}
            messages = [USER, {**called, "tool_calls": [call]}]
        case "reasoning":
            answer = {**ASSISTANT, "reasoning_content": mark}
        case "answer":
            answer = {"role": "assistant", "content": mark}
    for record in (batch(messages, answer), observation(messages, answer)):
        found, malformed = read_records(tmp_path, record)
        assert (found, malformed.counts) == ([], {REASON: 1})


def test_a_fixed_length_with_a_cut_in_a_word(tmp_path: Path) -> None:
    words = "which bridge is oldest " * 400
    assert is_cut(words[:4096])
    assert is_cut(words[:1000] + "...")
    # Of no such length, or with its end.
    assert not is_cut(words[:4093])
    assert not is_cut(words[:4095] + ".")
    logged = span({"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": words[:4096]})
    assert read_records(tmp_path, logged)[1].counts == {REASON: 1}
    # A client may send any length.
    (found,), _ = read_records(tmp_path, batch([{"role": "user", "content": words[:4096]}], {"content": SAY}))
    assert found.answer == ASSISTANT
