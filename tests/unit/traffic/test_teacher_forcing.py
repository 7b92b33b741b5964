"""Prompt and recorded answer as one sequence, with a renderer whose tokens are characters."""

from __future__ import annotations

from collections.abc import Mapping

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
