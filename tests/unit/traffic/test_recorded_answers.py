"""Whole families of records: JSON in text, cut text, streams in pieces, numbered attributes, orders of choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traffic_records import ASSISTANT, CALL, SAY, USER, batch, compact, observation, read_records, span

from reap_serve.traffic.answers.answer import answered, answered_output
from reap_serve.traffic.json_text import is_answer, read_input, read_output
from reap_serve.traffic.malformed import MalformedRecordError

MESSAGES = [USER, ASSISTANT, {"role": "user", "content": 'With "quotes", \\ and ü.'}]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None)
@given(value=json_values, indent=st.sampled_from([None, 2]))
def test_json_that_a_model_wrote_stays_as_it_is(value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    if not is_answer(value):  # type: ignore[arg-type]
        assert read_output(text) == text


@settings(deadline=None)
@given(times=st.integers(1, 3))
def test_json_encoded_several_times_is_decoded(times: int) -> None:
    text: object = MESSAGES
    for _ in range(times):
        text = compact(text)
    assert read_input(text) == MESSAGES  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "whole",
    [
        compact(MESSAGES),
        compact({"messages": MESSAGES}),
        repr(MESSAGES),
        compact(compact(MESSAGES)),
        json.dumps(MESSAGES, indent=1),
    ],
)
def test_messages_cut_anywhere_are_no_prompt(whole: str) -> None:
    # From the first letter of the first key on.
    for length in range(whole.index("e") + 1, len(whole)):
        with pytest.raises(MalformedRecordError):
            read_input(whole[:length])


@pytest.mark.parametrize(
    "whole",
    [
        compact(ASSISTANT),
        compact([ASSISTANT]),
        repr(ASSISTANT),
        compact({"choices": [{"index": 0, "message": ASSISTANT}]}),
    ],
)
def test_answers_cut_anywhere_are_no_text(whole: str) -> None:
    start = whole.index("assistant") + 9 if "choices" not in whole else whole.index("index")
    for length in range(start, len(whole)):
        with pytest.raises(MalformedRecordError):
            read_output(whole[:length])


def chunk(delta: dict[str, object], reason: str | None = None, index: int = 0) -> dict[str, object]:
    choice = {"index": index, "delta": delta, "finish_reason": reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def sse(events: list[dict[str, object]], end: str = "data: [DONE]\n\n") -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end


@settings(deadline=None)
@given(pieces=st.lists(texts, min_size=1, max_size=6), reasoning=st.lists(texts, max_size=3), data=st.data())
def test_a_stream_is_its_pieces(pieces: list[str], reasoning: list[str], data: st.DataObject) -> None:
    arguments = json.dumps({"town": data.draw(texts)})
    at = data.draw(st.integers(0, len(arguments)))
    events = [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"reasoning_content": piece}) for piece in reasoning),
        *(chunk({"content": piece}) for piece in pieces),
        chunk(
            {
                "tool_calls": [
                    {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments[:at]}}
                ]
            }
        ),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": arguments[at:]}}]}),
        chunk({}, "length"),
    ]
    for stream in (events, sse(events)):
        found = answered(stream, "chat")  # type: ignore[arg-type]
        assert found.message is not None
        assert found.message["content"] == "".join(pieces)
        assert found.message.get("reasoning", "") == "".join(reasoning)
        assert found.message["tool_calls"] == [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        ]
        assert found.truncated
    # Without its end, the beginning of its call or the mark of the end it is none.
    broken = [events[:-1], [*events[:-3], *events[-2:]], sse(events, end=""), sse(events)[:-40]]
    for stream in broken:
        assert answered(stream, "chat").broken  # type: ignore[arg-type]


def test_other_line_breaks_are_text() -> None:
    found = answered(sse([chunk({"content": "a\u2028b\x85c"}, "stop")]).replace("\\u2028", "\u2028"), "chat")
    assert found.message == {"role": "assistant", "content": "a\u2028b\x85c"}


def test_streams_of_other_apis() -> None:
    anthropic = [
        {
            "type": "message_start",
            "message": {
                "type": "message",
                "role": "assistant",
                "content": [],
                "usage": {"input_tokens": 9, "output_tokens": 1},
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm"}},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "The stone"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": " one."}},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 7}},
        {"type": "message_stop"},
    ]
    found = answered(anthropic, "chat")  # type: ignore[arg-type]
    assert found.message == {**ASSISTANT, "reasoning": "Hm"}
    assert found.truncated
    assert found.usage == {"input_tokens": 9, "output_tokens": 7}
    assert answered(anthropic[:-1], "chat").broken  # type: ignore[arg-type]
    response = {
        "object": "response",
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": SAY}]}],
    }
    events = [{"type": "response.created"}, {"type": "response.completed", "response": response}]
    assert answered(sse(events, end=""), "chat").message == ASSISTANT  # type: ignore[arg-type]
    assert answered(events[:1], "chat").broken  # type: ignore[arg-type]


def test_a_broken_stream_is_no_answer(tmp_path: Path) -> None:
    line = batch([USER]) | {"response": {"status_code": 200, "body": sse([chunk({"content": "The st"})], end="")}}
    (found,), malformed = read_records(tmp_path, line)
    assert (found.answer, found.broken, malformed.total) == (None, True, 0)


@settings(deadline=None)
@given(order=st.permutations([0, 1, 2, 3]))
def test_the_choice_of_index_0_is_the_answer(order: list[int]) -> None:
    choices = [{"index": index, "message": {"role": "assistant", "content": str(index)}} for index in order]
    found = answered({"choices": choices}, "chat")  # type: ignore[arg-type, dict-item]
    assert (found.message, found.choices) == ({"role": "assistant", "content": "0"}, 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(kept=st.sets(st.integers(0, 5), min_size=1))
def test_numbered_messages_with_a_gap_are_no_shorter_conversation(kept: set[int], tmp_path: Path) -> None:
    attributes: dict[str, object] = {"gen_ai.operation.name": "chat"}
    for index in kept:
        attributes[f"gen_ai.prompt.{index}.role"] = "user"
        attributes[f"gen_ai.prompt.{index}.content"] = str(index)
    found, malformed = read_records(tmp_path, span(attributes))
    if kept == set(range(len(kept))):
        assert found[0].body is not None
        assert found[0].body["messages"] == [{"role": "user", "content": str(index)} for index in sorted(kept)]
    else:
        assert (found, list(malformed.counts)) == ([], ["numbered attributes with a gap"])


@pytest.mark.parametrize("place", ["answer", "history"])
def test_reasoning_content_is_reasoning(place: str, tmp_path: Path) -> None:
    def record(key: str) -> dict[str, object]:
        thought = {**ASSISTANT, key: "Compare the years."}
        return batch([USER], thought) if place == "answer" else batch([USER, thought, USER], ASSISTANT)

    one, other = (read_records(tmp_path, record(key))[0][0] for key in ("reasoning", "reasoning_content"))
    assert (one.body, one.answer) == (other.body, other.answer)


@pytest.mark.parametrize(
    "output",
    [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"name": "look_up", "args": {"town": "Kelheim"}, "id": "c1", "type": "tool_call"}],
        },
        {
            "type": "message",
            "role": "assistant",
            "stop_reason": "tool_use",
            "content": [{"type": "tool_use", "id": "c1", "name": "look_up", "input": {"town": "Kelheim"}}],
        },
        [{"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"town": "Kelheim"}'}],
        {
            "choices": [
                {
                    "message": {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{**CALL, "function": {"name": "look_up", "arguments": {"town": "Kelheim"}}}],
                    }
                }
            ]
        },
    ],
)
def test_calls_of_every_api(output: object) -> None:
    found = answered_output(output, "chat").message  # type: ignore[arg-type]
    function = {"name": "look_up", "arguments": '{"town": "Kelheim"}'}
    assert found == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }


def test_observations_of_one_trace_share_its_session(tmp_path: Path) -> None:
    record = {"id": "t", "sessionId": "s", "observations": [observation([USER], SAY), observation([USER], SAY)]}
    found, _ = read_records(tmp_path, record)
    assert [request.session for request in found] == ["s", "s"]
