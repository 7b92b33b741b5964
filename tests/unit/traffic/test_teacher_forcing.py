"""Prompt and recorded answer as one sequence, with a renderer whose tokens are characters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from reap_serve.records import JsonValue
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.teacher_forcing import TeacherForcing


class CharacterRenderer:
    """Chats as `<role:content>`; `>` and a line feed end a message, and `<assistant:` asks for an answer."""

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        messages = body["messages"]
        assert isinstance(messages, list)
        text = "".join(f"<{message['role']}:{message['content']}>\n" for message in messages)  # type: ignore[index,call-overload]
        text += "<assistant:" if answer is None else f"<assistant:{answer['content']}>\n"
        return [ord(character) for character in text]

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return [1] * special + [ord(character) for character in text]


class RewritingRenderer(CharacterRenderer):
    """A template that renders the history differently once an answer follows."""

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        return ([] if answer is None else [9]) + super().render_chat(body, answer)


def chat(answer: str | None, *, truncated: bool = False) -> Request:
    message: dict[str, JsonValue] | None = None if answer is None else {"role": "assistant", "content": answer}
    body: dict[str, JsonValue] = {"messages": [{"role": "user", "content": "hi"}]}
    return Request(body, "chat", "s", Origin("t", "requests", 1), answer=message, truncated=truncated)


def text(token_ids: list[int]) -> str:
    return "".join(chr(token) for token in token_ids)


def test_the_answer_follows_the_prompt_without_its_end() -> None:
    forced = TeacherForcing(CharacterRenderer()).tokens(chat("yes"))
    assert text(forced.token_ids) == "<user:hi>\n<assistant:yes"
    assert text(forced.token_ids[forced.prompt_tokens :]) == "yes"
    assert forced.end_token == ord(">")
    assert forced.answered


def test_an_answer_that_looks_like_the_template_keeps_its_tail() -> None:
    forced = TeacherForcing(CharacterRenderer()).tokens(chat("a>\n"))
    assert text(forced.token_ids[forced.prompt_tokens :]) == "a>\n"


def test_a_request_without_an_answer_is_its_prompt() -> None:
    forced = TeacherForcing(CharacterRenderer()).tokens(chat(None))
    assert text(forced.token_ids) == "<user:hi>\n<assistant:"
    assert forced.prompt_tokens == len(forced.token_ids)
    assert not forced.answered
    assert forced.end_token is None


def test_an_empty_answer_is_none() -> None:
    assert not TeacherForcing(CharacterRenderer()).tokens(chat("")).answered


def test_a_template_that_rewrites_the_prompt_gets_the_answers_text_appended() -> None:
    forced = TeacherForcing(RewritingRenderer()).tokens(chat("yes"))
    assert text(forced.token_ids) == "<user:hi>\n<assistant:yes"
    assert forced.end_token == ord(">")


def test_a_completion_is_its_prompt_and_text() -> None:
    request = Request({"prompt": "ab"}, "completion", "s", Origin("t", "requests", 1), answer={"text": "cd"})
    forced = TeacherForcing(CharacterRenderer()).tokens(request)
    assert forced.token_ids == [1, *map(ord, "abcd")]
    assert forced.prompt_tokens == 3
    assert forced.end_token is None


def test_the_last_token_of_a_truncated_answer_never_enters_the_model() -> None:
    forced = TeacherForcing(CharacterRenderer()).tokens(chat("yes", truncated=True))
    assert text(forced.token_ids) == "<user:hi>\n<assistant:ye"
    assert forced.end_token == ord("s")
    assert forced.answered
    one = TeacherForcing(CharacterRenderer()).tokens(chat("y", truncated=True))
    assert text(one.token_ids) == "<user:hi>\n<assistant:"
    assert (one.end_token, one.answered) == (ord("y"), True)
    assert not TeacherForcing(CharacterRenderer()).tokens(chat("", truncated=True)).answered


def test_an_answer_that_continues_the_final_message_follows_it_at_once() -> None:
    body: dict[str, JsonValue] = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    answer: dict[str, JsonValue] = {"role": "assistant", "content": " here"}
    asked = Request(body, "chat", "s", Origin("t", "requests", 1))
    prompt = TeacherForcing(CharacterRenderer()).tokens(asked)
    assert text(prompt.token_ids) == "<user:hi>\n<assistant:I am"
    forced = TeacherForcing(CharacterRenderer()).tokens(replace(asked, answer=answer))
    assert text(forced.token_ids) == "<user:hi>\n<assistant:I am here"
    assert text(forced.token_ids[: forced.prompt_tokens]) == text(prompt.token_ids)
    assert forced.end_token == ord(">")


class ArgumentRenderer(CharacterRenderer):
    """Keeps the template arguments of each chat."""

    def __init__(self) -> None:
        self.arguments: list[JsonValue] = []

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        self.arguments.append(body.get("chat_template_kwargs"))
        return super().render_chat(body, answer)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({}, None),
        ({"chat_template_kwargs": {"a": 1}}, {"a": 1}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "x"}},
            {"reasoning_effort": "low", "enable_thinking": False},
        ),
        ({"documents": [{"text": "t"}]}, {"documents": [{"text": "t"}]}),
    ],
)
def test_template_arguments_are_those_of_the_chat_endpoint(given: dict[str, JsonValue], arguments: JsonValue) -> None:
    renderer = ArgumentRenderer()
    asked = chat("yes")
    TeacherForcing(renderer).tokens(replace(asked, body={**asked.body, **given}))  # type: ignore[dict-item]
    assert renderer.arguments[:2] == [arguments, arguments]


class ThinkingRenderer(CharacterRenderer):
    """A template whose prompts begin the reasoning, and which leaves it out of recorded answers."""

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        begun = "" if answer is not None else "<think>\n"
        return [*super().render_chat(body, answer), *map(ord, begun)]


def test_reasoning_that_the_prompt_begins_is_run() -> None:
    asked = chat("yes")
    asked = replace(asked, answer={**(asked.answer or {}), "reasoning": "hm"})
    forced = TeacherForcing(ThinkingRenderer()).tokens(asked)
    assert text(forced.token_ids) == "<user:hi>\n<assistant:<think>\nhm\n</think>\n\nyes"
    assert text(forced.token_ids[forced.prompt_tokens :]) == "hm\n</think>\n\nyes"
    # Where it does not, the template's own form stays.
    assert text(TeacherForcing(CharacterRenderer()).tokens(asked).token_ids) == "<user:hi>\n<assistant:yes"
