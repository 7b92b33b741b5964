"""What is said of greedy answers: loops, where two part, language, JSON, tool calls."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_traffic import CALLED, WEATHER, chat

from reap_serve.compare.answers import Answer, common_prefix, judge, loops
from reap_serve.compare.language import language_of
from reap_serve.compare.validity import ToolCall, asks_for_tool, calls_in_message, calls_in_text


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7] * 32, True),
        ([7] * 31, False),  # fewer than 32 tokens
        ([1, 2, 3] * 11, True),  # 33 tokens, the last 32 of period 3
        ([1, 2, 3] * 10, False),
        (list(range(64)) * 4, True),
        (list(range(64)) * 3, False),  # 3 times
        (list(range(65)) * 5, False),  # a period above 64
        ([9, 8, 7] + [5, 6] * 16, True),  # the loop is the end, not the whole
        ([5, 6] * 16 + [9], False),  # it has left the loop
        ([], False),
    ],
)
def test_loops(tokens: list[int], expected: bool) -> None:
    assert loops(tokens) is expected


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 9), min_size=1, max_size=64), st.data())
def test_every_repeated_period_is_found(start: list[int], period: list[int], data: st.DataObject) -> None:
    repeats = data.draw(st.integers(max(4, -(-32 // len(period))), 40))
    assert loops(start + period * repeats)


@given(st.permutations(range(100)))
def test_no_loop_where_no_token_repeats(tokens: list[int]) -> None:
    assert not loops(tokens)


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([5], [6]) == 0
    assert common_prefix([5, 6], [5, 6]) == 2


def test_the_engines_own_word_for_a_loop_counts() -> None:
    assert judge(Answer([1, 2], "ab", "repetition"), chat("q")).loops
    judged = judge(Answer([1, 2], "ab", "length"), chat("q"))
    assert (judged.loops, judged.length_limited, judged.empty) == (False, True, False)


def test_empty_is_neither_text_nor_call() -> None:
    assert judge(Answer([2], " \n"), chat("q")).empty
    assert not judge(Answer([2], "", tool_calls=(ToolCall("f", "{}"),)), chat("q")).empty


ENGLISH = "The answer is that you have to read the whole of this file from the start."
GERMAN = "Die Antwort ist nicht schwer: der Text wird mit einem Schlüssel für sich gelesen und auch geschrieben."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, "en"),
        (GERMAN, "de"),
        ("Le chat est dans la maison avec les enfants qui jouent pour le plaisir, et vous ?", "fr"),
        ("El perro y los gatos están en el jardín, pero la casa no es más grande con una puerta.", "es"),
        ("Собака бежит по дороге к большому дому.", "cyrillic"),
        ("今日は天気がいいので、公園まで散歩に行きましょう。", "ja"),
        ("今天天气很好我们一起去公园散步然后回家吃饭休息", "zh"),
        ("too short", None),
        ("zyx wvu tsr qpo nml kji hgf edc", None),  # no function word
        (f"{ENGLISH} {GERMAN}", None),  # two languages
        (f"```python\n{ENGLISH}\n```", None),  # quoted code is not prose
    ],
)
def test_language_of(text: str, expected: str | None) -> None:
    assert language_of(text) == expected


def test_language_is_compared_with_the_recorded_answer() -> None:
    assert judge(Answer([1], GERMAN), chat("q", ENGLISH)).language_switched is True
    assert judge(Answer([1], ENGLISH), chat("q", ENGLISH)).language_switched is False
    assert judge(Answer([1], "42"), chat("q", ENGLISH)).language_switched is None
    assert judge(Answer([1], ENGLISH), chat("q")).language_switched is None


OBJECT_WITH_A = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": OBJECT_WITH_A}}


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ('{"a": 1}', SCHEMA, True),
        ('{"a": "1"}', SCHEMA, False),
        ('{"b": 1}', SCHEMA, False),
        ('{"a": 1', SCHEMA, False),
        ('<think>{"b"}</think>\n{"a": 1}', SCHEMA, True),
        ('{"anything": null}', {"type": "json_object"}, True),
        ("[1]", {"type": "json_object"}, False),
        ("null", {"type": "json_object"}, False),
        ("{}", {"type": "text"}, None),
    ],
)
def test_json_against_the_requests_schema(text: str, form: dict[str, object], expected: bool | None) -> None:
    assert judge(Answer([1], text), chat("q", response_format=form)).json_valid is expected


def test_a_schema_elsewhere_is_not_fetched() -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:9/schema.json"}}}
    assert judge(Answer([1], "{}"), chat("q", response_format=form)).json_valid is True


def call(name: str, arguments: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (call("get_weather", {"city": "Bonn"}), True),
        (call("get_weather", {"city": "Bonn", "days": 2}), True),
        (call("get_weather", {"city": "Bonn"}) + call("get_weather", {"city": "Ulm"}), True),
        (call("get_weather", {"city": "Bonn"}) + call("get_news", {}), False),
        (call("get_weather", {"city": 7}), False),
        (call("get_weather", {}), False),
        (call("get_weather", "Bonn"), False),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Bo', False),
        ("It will rain.", False),
    ],
)
def test_tool_calls_in_text(text: str, expected: bool) -> None:
    assert judge(Answer([1], text), chat("q", CALLED, tools=[WEATHER])).tool_calls_valid is expected


def test_the_endpoints_reading_goes_before_the_text() -> None:
    request = chat("q", CALLED, tools=[WEATHER])
    good = calls_in_message({"tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}]})
    assert judge(Answer([1], "<other form>", tool_calls=tuple(good)), request).tool_calls_valid is True
    assert judge(Answer([1], call("get_weather", {"city": "Bonn"}), tool_calls=()), request).tool_calls_valid is False


def test_no_call_is_expected_where_none_was_recorded() -> None:
    assert judge(Answer([1], "Hello."), chat("q", "Hello.", tools=[WEATHER])).tool_calls_valid is None
    assert asks_for_tool({"tools": [WEATHER], "tool_choice": "required"}, None)
    assert not asks_for_tool({"tools": [WEATHER], "tool_choice": "auto"}, None)


def test_calls_in_text_keeps_null_arguments_apart_from_an_object() -> None:
    assert calls_in_text('<tool_call>{"name": "f"}</tool_call>') == [ToolCall("f", "null")]
    assert calls_in_text("<tool_call>not json</tool_call>")[0].name is None
