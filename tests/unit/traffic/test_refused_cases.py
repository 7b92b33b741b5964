"""What users bring and nobody can replay, record by record: refused, and by which name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traffic_records import (
    ANSWERED_FLAT,
    ASK,
    ASKED_FLAT,
    ASSISTANT,
    SAY,
    SYSTEM,
    USAGE,
    USER,
    P,
    batch,
    compact,
    observation,
    payload,
    read_records,
    shares,
    span,
)

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
