"""What of a record becomes the body of its request, and its lengths: tools, prompts, halves of surrogates, echoes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traffic_records import (
    ASK,
    ASKED_FLAT,
    CHAT_TOOL,
    OPENINFERENCE,
    SAY,
    TOOL,
    USER,
    compact,
    observation,
    payload,
    read_records,
    shares,
    span,
)


@pytest.mark.parametrize(
    "record",
    [
        shares(("human", ASK), ("gpt", SAY), tools=compact([TOOL])),
        shares(("human", ASK), ("gpt", SAY), tools=[CHAT_TOOL]),
        {"messages": [USER], "functions": [TOOL]},
        {
            "messages": [USER],
            "tools": [{**{key: TOOL[key] for key in ("name", "description")}, "input_schema": TOOL["parameters"]}],
        },
        {"messages": [USER], "tools": [{"type": "function", **TOOL}]},
        span(
            ASKED_FLAT
            | {
                "llm.request.functions.0.name": "look_up",
                "llm.request.functions.0.description": "finds a bridge",
                "llm.request.functions.0.parameters": compact(TOOL["parameters"]),
            }
        ),
        span(OPENINFERENCE | {"llm.tools.0.tool.json_schema": compact(CHAT_TOOL)}),
        observation({"messages": [USER], "tools": [CHAT_TOOL]}, SAY),
        payload([USER], SAY, model_parameters={"tools": [CHAT_TOOL]}),
    ],
)
def test_tools_reach_the_body(record: dict[str, object], tmp_path: Path) -> None:
    (found,), malformed = read_records(tmp_path, record)
    assert not malformed.total
    assert found.body is not None
    assert found.body["tools"] == [CHAT_TOOL]


@pytest.mark.parametrize(
    ("prompt", "record"),
    [
        (text, record)
        for text in (
            "[INST] Which? [/INST]",
            "{name} is",
            '{"a": 1} What is wrong with this?',
            '"Hello"',
            "[1, 2] sorted:",
        )
        for record in (observation(text, "x"), payload(text, "x"))
    ]
    + [('{"a": 1, "b": ', payload([{"role": "user", "content": '{"a": 1, "b": '}], "x", call_type="text_completion"))],
)
def test_prompts_that_begin_as_json_are_prompts(prompt: str, record: dict[str, object], tmp_path: Path) -> None:
    (found,), malformed = read_records(tmp_path, record)
    assert (malformed.total, found.kind, found.body and found.body["prompt"]) == (0, "completion", prompt)


def test_halves_of_surrogates_are_replaced_and_counted(tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": text} for text in ("a \ud83d b \ude00", "😀")]})
    (found,), malformed = read_records(tmp_path, line)
    assert found.body is not None
    assert found.body["messages"] == [{"role": "user", "content": "a � b �"}, {"role": "user", "content": "😀"}]
    assert malformed.replaced == 2


@pytest.mark.parametrize("depth", [300, 480, 900])
def test_a_half_surrogate_lets_no_record_be_deeper_than_others(depth: int, tmp_path: Path) -> None:
    line = (
        json.dumps({"messages": [{"role": "user", "content": "a \ud83d"}]})[:-1]
        + f', "x": {"[" * depth}{"]" * depth}}}'
    )
    found, malformed = read_records(tmp_path, {"messages": [USER]}, line)
    assert (len(found), malformed.counts) == (1, {"not JSON": 1})


def test_echo_is_not_counted_twice(tmp_path: Path) -> None:
    line = {
        "url": "/v1/completions",
        "custom_id": "a",
        "body": {"prompt": "Once", "echo": True},
        "response": {"body": {"choices": [{"index": 0, "text": "Once upon"}]}},
    }
    (found,), _ = read_records(tmp_path, line)
    assert (found.body, found.answer) == ({"prompt": "Once"}, {"text": " upon"})


def test_usage_with_cached_and_reasoning_tokens_apart(tmp_path: Path) -> None:
    details = {"input": 10, "input_cached_tokens": 90, "output": 5, "output_reasoning_tokens": 7, "total": 112}
    (found,), _ = read_records(tmp_path, observation([USER], SAY, usage_details=details))
    assert (found.prompt_tokens, found.output_tokens) == (100, 12)


@pytest.mark.parametrize(
    "record",
    [
        {"timestamp": 1767225600.5, "messages": [USER]},
        {"timestamp": "2026-01-01T00:00:00Z", "messages": [USER], "output_length": 3},
        {"timestamp": 12.5, "prompt": "a"},
        {"prompt": "a", "input_length": 1, "output_length": 2},
    ],
)
def test_a_log_of_ones_own_is_no_trace(record: dict[str, object], tmp_path: Path) -> None:
    (found,), _ = read_records(tmp_path, record)
    assert (found.origin.format, found.timestamp) == ("requests", None)
