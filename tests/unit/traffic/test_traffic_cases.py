"""What users bring, record by record: what of it is a prompt, what the answer, and what is refused by which name.

Expected messages are worked out by hand from the public description of each API.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_traffic_formats import identity
from traffic_records import (
    ASK,
    ASSISTANT,
    CALL,
    CHAT_TOOL,
    SAY,
    TOOL,
    USER,
    batch,
    compact,
    observation,
    payload,
    read_records,
    span,
)

from reap_serve.traffic.convert import write_batch

SYSTEM = {"role": "system", "content": "Answer from the register."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "built 1146"}
PARTS = [{"type": "text", "content": SAY}]
ITEMS = [
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Compare."}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": SAY}]},
]
RESPONSE = {"object": "response", "status": "completed", "output": ITEMS}
P, C = "gen_ai.prompt", "gen_ai.completion"
ASKED_FLAT = {f"{P}.0.role": "user", f"{P}.0.content": ASK}
ANSWERED_FLAT = {f"{C}.0.role": "assistant", f"{C}.0.content": SAY}
TOOL_TURN_FLAT = {
    f"{P}.0.role": "system",
    f"{P}.0.content": SYSTEM["content"],
    f"{P}.1.role": "user",
    f"{P}.1.content": ASK,
    f"{P}.2.role": "assistant",
    f"{P}.2.tool_calls.0.id": "c1",
    f"{P}.2.tool_calls.0.name": "look_up",
    f"{P}.2.tool_calls.0.arguments": '{"town":"Kelheim"}',
    f"{P}.3.role": "tool",
    f"{P}.3.content": "built 1146",
    f"{P}.3.tool_call_id": "c1",
}
USAGE = {"gen_ai.usage.input_tokens": 6, "gen_ai.usage.output_tokens": 4}
OPENINFERENCE = {
    "openinference.span.kind": "LLM",
    "llm.input_messages.0.message.role": "user",
    "llm.input_messages.0.message.content": ASK,
    "llm.output_messages.0.message.role": "assistant",
    "llm.output_messages.0.message.content": SAY,
}


def event(name: str, **attributes: object) -> dict[str, object]:
    return {"name": name, "attributes": attributes}


def shares(*turns: tuple[str, object], **more: object) -> dict[str, object]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **more}


# Name, record, messages of the prompt, answer.
READ: list[tuple[str, object, list[object], object]] = [
    ("numbered tool turn", span(TOOL_TURN_FLAT | ANSWERED_FLAT), [SYSTEM, USER, CALLED, RESULT], ASSISTANT),
    (
        "numbered answer is a call",
        span(
            ASKED_FLAT
            | {f"{C}.0.role": "assistant", f"{C}.0.tool_calls.0.id": "c1"}
            | {f"{C}.0.tool_calls.0.name": "look_up", f"{C}.0.tool_calls.0.arguments": '{"town":"Kelheim"}'}
        ),
        [USER],
        CALLED,
    ),
    (
        "numbered content is parts",
        span({f"{P}.0.role": "user", f"{P}.0.content": compact([{"type": "text", "text": ASK}])} | ANSWERED_FLAT),
        [USER],
        ASSISTANT,
    ),
    ("nothing was dropped", span(ASKED_FLAT | ANSWERED_FLAT, droppedAttributesCount=0), [USER], ASSISTANT),
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
    ("openinference", span(OPENINFERENCE), [USER], ASSISTANT),
    (
        "openinference nested",
        span(
            {
                "openinference": {"span": {"kind": "LLM"}},
                "llm": {"input_messages": [{"message": USER}], "output_messages": [{"message": ASSISTANT}]},
            }
        ),
        [USER],
        ASSISTANT,
    ),
    (
        "message events",
        span(
            {"gen_ai.operation.name": "chat", **USAGE},
            events=[
                event("gen_ai.user.message", content=ASK),
                event("gen_ai.choice", index=1, message=compact({"content": "B"})),
                event("gen_ai.choice", index=0, message=compact(ASSISTANT)),
            ],
        ),
        [USER],
        ASSISTANT,
    ),
    (
        "content events",
        span(
            {"gen_ai.operation.name": "chat", **USAGE},
            events=[
                event("gen_ai.content.prompt", **{"gen_ai.prompt": compact([USER])}),
                event("gen_ai.content.completion", **{"gen_ai.completion": compact([ASSISTANT])}),
            ],
        ),
        [USER],
        ASSISTANT,
    ),
    (
        "events attribute",
        span(
            {
                "gen_ai.operation.name": "chat",
                **USAGE,
                "events": compact(
                    [
                        {"event.name": "gen_ai.user.message", **USER},
                        {"event.name": "gen_ai.choice", "message": ASSISTANT},
                    ]
                ),
            }
        ),
        [USER],
        ASSISTANT,
    ),
    (
        "ai sdk",
        span(
            {
                "ai.operationId": "ai.generateText.doGenerate",
                "ai.prompt.messages": compact(
                    [
                        {"role": "user", "content": [{"type": "text", "text": ASK}]},
                        {
                            "role": "assistant",
                            "content": [{"type": "tool-call", "toolCallId": "c1", "toolName": "look_up", "input": {}}],
                        },
                        {
                            "role": "tool",
                            "content": [
                                {
                                    "type": "tool-result",
                                    "toolCallId": "c1",
                                    "toolName": "look_up",
                                    "output": {"type": "text", "value": "built 1146"},
                                }
                            ],
                        },
                    ]
                ),
                "ai.response.text": SAY,
                **USAGE,
            }
        ),
        [
            {"role": "user", "content": [{"type": "text", "text": ASK}]},
            {**CALLED, "tool_calls": [{**CALL, "function": {"name": "look_up", "arguments": "{}"}}]},
            RESULT,
        ],
        ASSISTANT,
    ),
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


def read_one(path: Path, record: object) -> tuple[object, object]:
    (found,), malformed = read_records(path, json.dumps(record) if isinstance(record, dict) else record)
    assert not malformed.total, str(malformed)
    assert found.body is not None
    # What is read must come back from what `convert` writes of it.
    converted = path / "converted.jsonl"
    with converted.open("wb") as stream:
        write_batch([found], stream)
    (again,), _ = read_records(path, converted.read_text())
    assert identity(again) == identity(found)
    return found.body["messages"], found.answer


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


LONG = compact([{"role": "user", "content": "Which bridge is oldest? " * 8}])
# Name, record, beginning of the reason.
REFUSED: list[tuple[str, object, str]] = [
    ("turn missing", span({f"{P}.0.role": "user", f"{P}.0.content": "a", f"{P}.2.content": "b"}), "numbered"),
    ("first turns missing", span({f"{P}.3.role": "user", f"{P}.3.content": "a"} | ANSWERED_FLAT), "numbered"),
    ("attributes dropped", span(ASKED_FLAT | ANSWERED_FLAT, droppedAttributesCount=7), "span that dropped"),
    ("input cut", observation(LONG[:90], ASSISTANT), "broken JSON"),
    ("input cut at its first key", observation('[{"ro', ASSISTANT), "broken JSON"),
    ("input cut, litellm", payload(LONG[:90], ASSISTANT), "broken JSON"),
    ("body cut", observation('{"model":"m","messages":[{"role":"user","content":"a b', SAY), "broken JSON"),
    ("input and a mark", observation(compact([USER]) + "...[truncated]", SAY), "broken JSON"),
    ("output cut", observation([USER], compact(ASSISTANT)[:30]), "broken JSON"),
    ("single quotes", observation("[{'role': 'user', 'content': 'Which bridge?'}]", ASSISTANT), "broken JSON"),
    ("half a surrogate", observation('[{"role":"user","content":"a \\ud83d b"}]', SAY), "broken JSON"),
    ("object of Python", observation("[HumanMessage(content='a')]", SAY), "text of a Python"),
    ("answer of Python", observation([USER], "ChatCompletion(id='x', choices=[])"), "text of a Python"),
    ("input of other keys", observation({"question": ASK}, SAY), "input is neither"),
    ("no content", batch([USER, {"role": "assistant"}, USER], ASSISTANT), "message without content"),
    ("null answer", batch([USER], {"role": "assistant", "content": None}), "message without content"),
    ("answer under output of a message", batch([USER], {"role": "assistant", "output": SAY}), "message without"),
    ("images beside turns", shares(("human", "<image>a"), ("gpt", SAY), images=["a.png"]), "images beside"),
    ("images beside messages", {"messages": [USER], "images": ["a.png"]}, "images beside"),
    ("call that is no JSON", shares(("human", ASK), ("function_call", "look_up(x)"), ("gpt", SAY)), "turn of a func"),
    ("two systems", {"messages": [SYSTEM, USER], "system": "Another."}, "system beside"),
    (
        "tool_use without result",
        batch(
            [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}, USER],
            ASSISTANT,
        ),
        "tool_use without",
    ),
    ("provider's own tool", batch([USER], ASSISTANT, tools=[{"type": "web_search"}]), "tool that is no function"),
    (
        "encrypted thinking",
        batch([USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}], ASSISTANT),
        "thinking that",
    ),
    (
        "turns on the server",
        {"url": "/v1/responses", "custom_id": "r", "body": {"input": "a", "previous_response_id": "resp_1"}},
        "previous_response_id",
    ),
    ("suffix", {"prompt": "a", "suffix": "b"}, "suffix beside"),
    (
        "trace alone",
        {"id": "t", "timestamp": "2026-01-01T00:00:00Z", "session_id": "s", "input": "a", "output": "b"},
        "trace without",
    ),
    (
        "names of observations",
        {"data": [{"id": "t", "input": "a", "output": "b", "observations": ["x"]}], "meta": {}},
        "trace with the names",
    ),
    (
        "mlflow",
        span({"mlflow.spanType": '"CHAT_MODEL"', "mlflow.spanInputs": compact({"messages": [USER]})}),
        "text in attributes",
    ),
    (
        "logfire",
        span({"request_data": compact({"messages": [USER]}), "response_data": "{}", **USAGE}),
        "text in attributes",
    ),
    (
        "message of its own record",
        {
            "resourceLogs": [
                {"scopeLogs": [{"logRecords": [{"eventName": "gen_ai.user.message", "body": {"stringValue": "a"}}]}]}
            ]
        },
        "messages that are log records",
    ),
    ("generations", observation([USER], {"generations": [[{"text": SAY}]]}), "generations"),
    (
        "equal indices",
        batch([USER])
        | {"response": {"body": {"choices": [{"index": 0, "message": ASSISTANT}, {"index": 0, "message": ASSISTANT}]}}},
        "choices of the response",
    ),
    (
        "echo without the prompt",
        {
            "url": "/v1/completions",
            "custom_id": "a",
            "body": {"prompt": "Once", "echo": True},
            "response": {"body": {"choices": [{"text": " upon"}]}},
        },
        "echo without",
    ),
    ("beyond a float", '{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "number beyond"),
    ("slice with a line break", batch([USER], metadata={"reap_slice": "a\nb"}), "metadata.reap_slice"),
    ("slice of 5,000", batch([USER], metadata={"reap_slice": "s" * 5000}), "metadata.reap_slice"),
    ("slice with an escape", payload([USER], SAY, metadata={"reap_slice": "\x1b[31m"}), "slice is not"),
]


@pytest.mark.parametrize(("record", "reason"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(record: object, reason: str, tmp_path: Path) -> None:
    found, malformed = read_records(tmp_path, record if isinstance(record, str) else json.dumps(record))
    assert not found
    assert [text.startswith(reason) for text in malformed.counts] == [True], str(malformed)


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
