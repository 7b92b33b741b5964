"""Shapes of further loggers, servers and collections: each is read as it was asked and answered, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traffic_records import ASK, ASSISTANT, SAY, USER, batch, observation, read_records

CHOICE = {"index": 0, "finish_reason": "stop", "message": ASSISTANT}
CHUNKS = [
    {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    for delta, reason in (({"role": "assistant", "content": "The stone"}, None), ({"content": " one."}, "stop"))
]
STREAM = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n"
CUT = {**CHOICE, "finish_reason": "length"}


@pytest.mark.parametrize(
    "output",
    [
        CHOICE,
        [CHOICE],
        [{"message": ASSISTANT, "index": 0}],
        json.dumps([CHOICE]),
        [{**CHOICE, "index": 1, "message": {"role": "assistant", "content": "No."}}, CHOICE],
        [{"text": SAY, "index": 0, "finish_reason": "stop"}],
        f": OPENROUTER PROCESSING\n\n{STREAM}",
        f"retry: 5\nid: 1\n{STREAM}",
    ],
)
def test_answers(output: object, tmp_path: Path) -> None:
    for record in (observation([USER], output), {"messages": [USER], "output": output}):
        (found,), _ = read_records(tmp_path, record)
        assert (found.answer, found.truncated) == (ASSISTANT, False)


@pytest.mark.parametrize("output", [CUT, [CUT]])
def test_a_choice_says_that_it_was_cut(output: object, tmp_path: Path) -> None:
    (found,), _ = read_records(tmp_path, observation([USER], output))
    assert found.truncated


@pytest.mark.parametrize("output", [[{"index": 0, "text": "a"}, {"index": 1, "text": "b"}], [{"message": "a"}]])
def test_json_that_a_model_wrote_is_no_choice(output: object, tmp_path: Path) -> None:
    (found,), _ = read_records(tmp_path, observation([USER], output))
    assert found.answer is not None
    assert json.loads(str(found.answer["content"])) == output


def test_an_answer_beside_the_messages(tmp_path: Path) -> None:
    (found,), _ = read_records(tmp_path, {"model": "m", "messages": [USER], "message": ASSISTANT, "done": True})
    assert (found.body, found.answer) == ({"model": "m", "messages": [USER], "done": True}, ASSISTANT)


def test_roles_in_other_letters(tmp_path: Path) -> None:
    messages = [{"role": "User", "content": ASK}, {"role": "ASSISTANT", "content": SAY}]
    (found,), _ = read_records(tmp_path, {"messages": messages})
    assert found.body is not None
    assert (found.body["messages"], found.answer) == ([USER], ASSISTANT)


def test_the_analysis_channel_is_reasoning(tmp_path: Path) -> None:
    analysis = {"role": "assistant", "channel": "analysis", "content": "Compare."}
    (found,), _ = read_records(tmp_path, {"messages": [USER, analysis, {**ASSISTANT, "channel": "final"}]})
    assert found.body is not None
    assert (found.body["messages"], found.answer) == ([USER], {**ASSISTANT, "reasoning": "Compare."})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": ASK, "chosen": SAY, "rejected": "No."}, "chosen beside the prompt"),
        (
            {
                "conversations": [{"from": "human", "value": ASK}],
                "chosen": {"from": "gpt", "value": SAY},
                "rejected": {"from": "gpt", "value": "No."},
            },
            "chosen beside the messages",
        ),
        ({"prompt": "", "prompt_embeds": "aGk="}, "prompt_embeds beside the prompt"),
        ({"prompt": ASK, "system": "Be brief.", "response": SAY}, "system beside the prompt"),
        ({"prompt": ASK, "context": [1, 2, 3], "response": SAY}, "context of earlier turns beside the prompt"),
        (
            batch([USER, {"role": "assistant", "channel": "commentary", "content": "x"}, USER]),
            "message of the commentary channel",
        ),
    ],
)
def test_refused_by_name(record: object, reason: str, tmp_path: Path) -> None:
    found, malformed = read_records(tmp_path, record)
    assert (found, malformed.counts) == ([], {reason: 1})
