"""Requests, logs and collections, record by record: what of each is a prompt, and what the answer.

Expected messages are worked out by hand from the public description of each API.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traffic_records import (
    ASK,
    ASSISTANT,
    CALL,
    CALLED,
    RESULT,
    SAY,
    SYSTEM,
    USER,
    batch,
    compact,
    observation,
    payload,
    read_one,
    shares,
)

PARTS = [{"type": "text", "content": SAY}]
ITEMS = [
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Compare."}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": SAY}]},
]
RESPONSE = {"object": "response", "status": "completed", "output": ITEMS}
# Name, record, messages of the prompt, answer.
READ: list[tuple[str, object, list[object], object]] = [
    ("twice encoded", observation(compact(compact([USER])), compact(compact(ASSISTANT))), [USER], ASSISTANT),
    ("message in an answer's text", observation([USER], compact(ASSISTANT)), [USER], ASSISTANT),
    (
        "parts in a content",
        observation([{"role": "user", "content": compact([{"type": "text", "text": ASK}])}], SAY),
        [USER],
        ASSISTANT,
    ),
    (
        "parts are what a client sent",
        batch([{"role": "user", "content": '[{"type":"text","text":"a"}]'}], ASSISTANT),
        [{"role": "user", "content": '[{"type":"text","text":"a"}]'}],
        ASSISTANT,
    ),
    (
        "parts are what a tool returned",
        observation([USER, CALLED, {**RESULT, "content": '[{"type":"text","text":"a"}]'}], SAY),
        [USER, CALLED, {**RESULT, "content": '[{"type":"text","text":"a"}]'}],
        ASSISTANT,
    ),
    ("answer with parts", observation([USER], [{"role": "assistant", "parts": PARTS}]), [USER], ASSISTANT),
    ("history with parts", batch([USER, {"role": "assistant", "parts": PARTS}, USER]), [USER, ASSISTANT, USER], None),
    ("items", observation([USER], ITEMS), [USER], {**ASSISTANT, "reasoning": "Compare."}),
    ("response object", observation([USER], RESPONSE), [USER], {**ASSISTANT, "reasoning": "Compare."}),
    ("answer under text", observation([USER], {"text": SAY}), [USER], ASSISTANT),
    ("answer under completion", observation([USER], {"completion": SAY}), [USER], ASSISTANT),
    (
        "function call",
        batch([USER], {"role": "assistant", "content": None, "function_call": CALL["function"]}),
        [USER],
        {**CALLED, "tool_calls": [{**CALL, "id": "call_0"}]},
    ),
    (
        "function call in the history",
        batch(
            [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "look_up", "content": "built 1146"},
            ],
            ASSISTANT,
        ),
        [
            USER,
            {**CALLED, "tool_calls": [{**CALL, "id": "call_0"}]},
            {**RESULT, "tool_call_id": "call_0", "name": "look_up"},
        ],
        ASSISTANT,
    ),
    ("empty answer", batch([USER], {"role": "assistant", "content": ""}), [USER], {"role": "assistant", "content": ""}),
    (
        "reasoning without content",
        batch([USER], {"role": "assistant", "content": None, "reasoning_content": "Hm"}),
        [USER],
        {"role": "assistant", "content": None, "reasoning": "Hm"},
    ),
    (
        "refusal",
        batch([USER], {"role": "assistant", "content": None, "refusal": "No."}),
        [USER],
        {"role": "assistant", "content": "No."},
    ),
    ("system beside", {"messages": [USER], "system": SYSTEM["content"]}, [SYSTEM, USER], None),
    (
        "system blocks beside",
        {"messages": [USER], "system": [{"type": "text", "text": SYSTEM["content"]}]},
        [SYSTEM, USER],
        None,
    ),
    ("system twice the same", {"messages": [SYSTEM, USER], "system": SYSTEM["content"]}, [SYSTEM, USER], None),
    (
        "tool blocks",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm", "signature": "s"},
                        {"type": "tool_use", "id": "c1", "name": "look_up", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": "built 1146"},
                        {"type": "text", "text": ASK},
                    ],
                },
            ]
        },
        [
            USER,
            {
                "role": "assistant",
                "content": None,
                "reasoning": "Hm",
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}],
            },
            RESULT,
            USER,
        ],
        None,
    ),
    (
        "responses request",
        {
            "url": "/v1/responses",
            "custom_id": "r",
            "body": {
                "input": [
                    USER,
                    {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"town":"Kelheim"}'},
                    {"type": "function_call_output", "call_id": "c1", "output": "built 1146"},
                ],
                "instructions": SYSTEM["content"],
            },
            "response": {"status_code": 200, "body": RESPONSE},
        },
        [SYSTEM, USER, CALLED, RESULT],
        {**ASSISTANT, "reasoning": "Compare."},
    ),
    (
        "calls by turns",
        shares(
            ("human", ASK),
            ("function_call", compact({"name": "look_up", "arguments": {"town": "Kelheim"}})),
            ("observation", "built 1146"),
            ("gpt", SAY),
        ),
        [
            USER,
            {
                **CALLED,
                "tool_calls": [
                    {
                        "id": "call_0",
                        "type": "function",
                        "function": {"name": "look_up", "arguments": '{"town": "Kelheim"}'},
                    }
                ],
            },
            {**RESULT, "tool_call_id": "call_0"},
        ],
        ASSISTANT,
    ),
    ("turns without images", shares(("human", ASK), ("gpt", SAY), images=[]), [USER], ASSISTANT),
    (
        "langfuse trace",
        {
            "id": "t",
            "timestamp": "2026-01-01T00:00:00Z",
            "input": "typed",
            "output": "shown",
            "observations": [{**observation({"x": 1}, {}), "type": "SPAN"}, observation([USER], SAY)],
        },
        [USER],
        ASSISTANT,
    ),
    (
        "langfuse download",
        {"trace": {"id": "t", "input": "typed", "output": "shown"}, "observations": [observation([USER], SAY)]},
        [USER],
        ASSISTANT,
    ),
    ("langfuse page", {"data": [observation([USER], SAY)], "meta": {"page": 1}}, [USER], ASSISTANT),
    ("arguments of a decorator", observation({"args": [], "kwargs": {"messages": [USER]}}, SAY), [USER], ASSISTANT),
    (
        "choices by index",
        batch([USER])
        | {
            "response": {
                "status_code": "200",
                "body": {
                    "choices": [
                        {"index": 1, "message": {"role": "assistant", "content": "B"}},
                        {"index": 0, "message": ASSISTANT},
                    ]
                },
            }
        },
        [USER],
        ASSISTANT,
    ),
    (
        "failed with a status in text",
        batch([USER]) | {"response": {"status_code": "500", "body": {"choices": [{"index": 0, "message": ASSISTANT}]}}},
        [USER],
        None,
    ),
    ("own log in seconds", {"timestamp": 1767225600.5, "messages": [USER], "response": SAY}, [USER], ASSISTANT),
    (
        "half a surrogate in the line",
        batch([{"role": "user", "content": "a"}], ASSISTANT) | {"custom_id": "\ud83d"},
        [{"role": "user", "content": "a"}],
        ASSISTANT,
    ),
]


@pytest.mark.parametrize(("record", "messages", "answer"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_read(record: object, messages: list[object], answer: object, tmp_path: Path) -> None:
    assert read_one(tmp_path, record) == (messages, answer)


@pytest.mark.parametrize(
    "text",
    [
        '{"bridge": "stone", "year": 1146}',
        '["stone", "iron"]',
        '{"role": "mayor", "content": "of a town"}',
        '{"message": {"to": "mayor"}}',
        '{"choices": ["stone", "iron"]}',
        '{"bridge": "sto',
        '"stone"',
        "{stone}",
        "1146",
    ],
)
@pytest.mark.parametrize("record", [observation, payload])
def test_an_answer_that_is_json_stays_byte_for_byte(record: object, text: str, tmp_path: Path) -> None:
    assert callable(record)
    assert read_one(tmp_path, record([USER], text)) == ([USER], {"role": "assistant", "content": text})


def test_an_answer_that_is_a_value_is_its_json(tmp_path: Path) -> None:
    _, answer = read_one(tmp_path, observation([USER], {"bridge": "stone", "year": 1146}))
    assert isinstance(answer, dict)
    assert json.loads(answer["content"]) == {"bridge": "stone", "year": 1146}
