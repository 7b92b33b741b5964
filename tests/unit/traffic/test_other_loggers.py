"""Shapes of further loggers, servers and collections: each is read as it was asked and answered, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traffic_records import (
    ASK,
    ASSISTANT,
    CALL,
    CHAT_TOOL,
    SAY,
    USER,
    batch,
    compact,
    observation,
    payload,
    read_records,
)

from reap_serve.errors import TrafficError
from reap_serve.traffic.read import read_traffic

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
        ({"prompt": ASK, "context": "A passage.", "response": SAY}, "context beside the prompt"),
        ({"prompt": "Translate.", "input": "Bridge", "output": "Pont"}, "input beside the prompt"),
        ({"prompt": ASK, "history": [["a", "b"]], "response": SAY}, "history beside the prompt"),
        (
            batch([USER, {"role": "assistant", "channel": "commentary", "content": "x"}, USER]),
            "message of the commentary channel",
        ),
    ],
)
def test_refused_by_name(record: object, reason: str, tmp_path: Path) -> None:
    found, malformed = read_records(tmp_path, record)
    assert (found, malformed.counts) == ([], {reason: 1})


RESPONSE = {"object": "chat.completion", "choices": [CHOICE], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}
ASKED = {"model": "m", "messages": [USER]}


@pytest.mark.parametrize(
    "record",
    [
        {"request_id": "r", "request_body": ASKED, "response_body": RESPONSE, "response_status": 200},
        {"request": ASKED, "response": RESPONSE},
        {"request": compact(ASKED), "response": compact(RESPONSE)},
        {"request": {"method": "POST", "body": ASKED}, "response": {"status": 200, "body": RESPONSE}},
        {"id": "r", "run_type": "llm", "inputs": ASKED, "outputs": RESPONSE, "error": None, "status": "success"},
        {"op_name": "chat", "trace_id": "t", "attributes": {}, "inputs": ASKED, "output": RESPONSE},
        {"id": "c", "object": "chat.completion", **ASKED, **RESPONSE},
    ],
)
def test_a_body_and_its_response(record: object, tmp_path: Path) -> None:
    (found,), malformed = read_records(tmp_path, record)
    assert not malformed.total, str(malformed)
    assert (found.body, found.answer, found.prompt_tokens, found.output_tokens) == (ASKED, ASSISTANT, 9, 4)


def test_an_answer_of_a_pair_that_is_json_stays_byte_for_byte(tmp_path: Path) -> None:
    for text in ('{"bridge":  "stone"}', '{"body": "stone"}'):
        (found,), _ = read_records(tmp_path, {"request": ASKED, "response": text})
        assert found.answer == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "record",
    [
        {"request_body": ASKED, "response_body": RESPONSE, "response_status": 500},
        {"request": ASKED, "response": {"status": "429", "body": RESPONSE}},
        {"run_type": "llm", "inputs": ASKED, "outputs": RESPONSE, "error": "timeout"},
        observation([USER], SAY, level="ERROR", statusMessage="timeout"),
    ],
)
def test_what_failed_has_no_answer(record: object, tmp_path: Path) -> None:
    (found,), _ = read_records(tmp_path, record)
    assert (found.body and found.body["messages"], found.answer) == ([USER], None)


def test_runs_of_other_types_are_no_calls_of_a_model(tmp_path: Path) -> None:
    chain = {"run_type": "chain", "inputs": {"messages": [USER, USER]}, "outputs": {"messages": [ASSISTANT]}}
    found, malformed = read_records(tmp_path, chain, {"run_type": "llm", "inputs": ASKED, "outputs": RESPONSE})
    assert ([request.body for request in found], malformed.total) == ([ASKED], 0)


def test_details_of_reasoning_are_reasoning(tmp_path: Path) -> None:
    details = [{"type": "reasoning.text", "text": "Compare "}, {"type": "reasoning.text", "text": "the years."}]
    for place in ([USER, {**ASSISTANT, "reasoning_details": details}, USER], [USER]):
        answer = {**ASSISTANT, "reasoning_details": details}
        (found,), _ = read_records(tmp_path, batch(place, answer))
        expected = {**ASSISTANT, "reasoning": "Compare the years."}
        assert found.answer == expected
        assert found.body is not None
        assert found.body["messages"] == [USER, expected, USER][: len(place)]
    hidden = {**ASSISTANT, "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}
    assert read_records(tmp_path, batch([USER], hidden))[1].counts == {"thinking that its provider encrypted": 1}


def test_what_langchain_keeps_in_additional_kwargs(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": "", "additional_kwargs": {"tool_calls": [CALL]}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "built 1146"}
    (found,), _ = read_records(tmp_path, observation([USER, called, result], {**called, "response_metadata": {}}))
    assert found.body is not None
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.body["messages"] == [USER, expected, result]
    assert found.answer is not None
    assert found.answer["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    "record",
    [
        observation([USER, {"role": "tool", "content": CHAT_TOOL}], SAY),
        observation({"messages": [USER, {"role": "tool", "content": compact(CHAT_TOOL)}]}, SAY),
        {"input": [USER], "output": [CHOICE], "metadata": {"model": "m", "tools": [CHAT_TOOL]}},
    ],
)
def test_tools_among_messages_and_in_metadata(record: object, tmp_path: Path) -> None:
    (found,), _ = read_records(tmp_path, record)
    assert found.body is not None
    assert (found.body["messages"], found.body["tools"], found.answer) == ([USER], [CHAT_TOOL], ASSISTANT)


def test_a_result_that_looks_like_a_tool_is_a_result(tmp_path: Path) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": compact(CHAT_TOOL)},
    ]
    (found,), _ = read_records(tmp_path, observation(messages, SAY))
    assert found.body is not None
    assert (found.body["messages"], "tools" in found.body) == (messages, False)


@pytest.mark.parametrize(
    "output",
    [
        {"text": SAY, "toolCalls": [], "finishReason": "stop", "usage": {}},
        {"replies": [ASSISTANT]},
        {"replies": [{"role": "assistant", "content": [{"text": SAY}]}], "meta": []},
        {"replies": [SAY]},
    ],
)
def test_results_of_sdks(output: object, tmp_path: Path) -> None:
    (found,), _ = read_records(tmp_path, observation([USER], output))
    assert found.answer == ASSISTANT


def test_calls_of_the_ai_sdk(tmp_path: Path) -> None:
    calls = [{"toolCallId": "c1", "toolName": "look_up", "args": {"town": "Kelheim"}}]
    (found,), _ = read_records(tmp_path, observation([USER], {"text": "", "toolCalls": calls}))
    function = {"name": "look_up", "arguments": '{"town": "Kelheim"}'}
    assert found.answer == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }


@pytest.mark.parametrize("body", [ASKED, {"url": "u", "body": ASKED}, compact(ASKED)])
def test_rows_of_the_proxy_that_keep_the_request(body: object, tmp_path: Path) -> None:
    row = payload("{}", compact(RESPONSE), proxy_server_request=body, prompt_tokens=9, completion_tokens=4)
    (found,), _ = read_records(tmp_path, row)
    assert (found.body, found.answer) == (ASKED, ASSISTANT)


def test_a_record_that_is_not_known_is_shown_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"instruction": "a", "input": "b", "output": "c", "what was asked?": 1}))
    with pytest.raises(
        TrafficError, match=r"its first record is not known \(with the keys instruction, input, output, \.\.\.\)"
    ):
        list(read_traffic([str(path)]))
    path.write_bytes('{"messages": [{"role": "user", "content": "é"}]}'.encode("latin-1"))
    with pytest.raises(
        TrafficError, match=r"its first record cannot be read \(not UTF-8 on line 1\); it may be Latin-1"
    ):
        list(read_traffic([str(path)], skip_malformed=True))
