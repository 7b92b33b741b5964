"""Spans of OpenTelemetry in each vocabulary: what of them is a prompt, and what the answer.

Expected messages are worked out by hand from the public description of each API.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from traffic_records import (
    ANSWERED_FLAT,
    ASK,
    ASKED_FLAT,
    ASSISTANT,
    CALL,
    CALLED,
    OPENINFERENCE,
    RESULT,
    SAY,
    SYSTEM,
    USAGE,
    USER,
    C,
    P,
    compact,
    read_one,
    span,
)

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


def event(name: str, **attributes: object) -> dict[str, object]:
    return {"name": name, "attributes": attributes}


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
]


@pytest.mark.parametrize(("record", "messages", "answer"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_read(record: object, messages: list[object], answer: object, tmp_path: Path) -> None:
    assert read_one(tmp_path, record) == (messages, answer)
