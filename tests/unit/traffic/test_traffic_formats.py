"""Each format's fixture, written from its public specification, gives the requests that the specification means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traffic_records import identity

from reap_serve.traffic.convert import batch_line
from reap_serve.traffic.formats import FORMATS
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.request import Request

FIXTURES = Path(__file__).parent / "fixtures"
FORMAT_OF = {
    "openai_batch.jsonl": "openai-batch",
    "requests.jsonl": "requests",
    "sharegpt.json": "sharegpt",
    "litellm.jsonl": "litellm",
    "langfuse.jsonl": "langfuse",
    "langfuse.csv": "langfuse",
    "otel.jsonl": "otel",
    "otel_span.jsonl": "otel",
    "mooncake.jsonl": "mooncake",
    "mooncake_text.jsonl": "mooncake",
    "azure.csv": "azure",
    "burstgpt.csv": "burstgpt",
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def read(name: str) -> list[Request]:
    return list(read_traffic([str(FIXTURES / name)], require_text=False))


def messages(request: Request) -> list[dict[str, object]]:
    assert request.body is not None
    return list(request.body["messages"])  # type: ignore[arg-type]


def test_every_format_has_a_fixture() -> None:
    assert set(FORMAT_OF.values()) == set(FORMATS)
    assert {path.name for path in FIXTURES.iterdir()} == {*FORMAT_OF, "README.md"}


@pytest.mark.parametrize(("name", "format"), FORMAT_OF.items())
def test_format_is_found_by_content(name: str, format: str) -> None:
    assert {request.origin.format for request in read(name)} == {format}


def test_openai_batch() -> None:
    joined, history, completion, failed = read("openai_batch.jsonl")
    assert (joined.id, joined.slice, joined.kind) == ("request-1", "chat", "chat")
    assert joined.answer == {"role": "assistant", "content": "Hi!"}
    assert joined.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "Hello world!"}],
        "max_tokens": 1000,
        "metadata": {"team": "a"},
    }
    assert (joined.prompt_tokens, joined.output_tokens) == (22, 2)
    # Without a response the final assistant message is the answer, and tools stay in the prompt.
    assert history.answer == {"role": "assistant", "content": "It rains."}
    assert [message["role"] for message in messages(history)] == ["user", "assistant", "tool"]
    assert history.body is not None
    assert history.body["tool_choice"] == "auto"
    assert completion.kind == "completion"
    assert completion.body == {"model": "m", "prompt": "Once upon", "max_tokens": 5}
    assert completion.answer == {"text": " a time"}
    assert (joined.truncated, completion.truncated) == (False, True)
    assert failed.answer is None
    assert failed.slice == "default"


def test_requests() -> None:
    called, ids, continued = read("requests.jsonl")
    assert called.answer == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert (called.slice, called.timestamp, called.session) == ("tools", 12.5, "s1")
    assert called.body is not None
    assert "metadata" not in called.body
    assert ids.body == {"model": "m", "prompt": [1, 2, 3]}
    assert ids.id == "2"
    # A message that is to be continued belongs to the prompt.
    assert continued.answer is None
    assert messages(continued)[-1] == {"role": "assistant", "content": "I am"}


def test_sharegpt_keeps_the_whole_conversation() -> None:
    dialogue, unanswered, wildchat = read("sharegpt.json")
    assert [(message["role"], message["content"]) for message in messages(dialogue)] == [
        ("user", 'Summarize: "a [b] {c}"'),
        ("assistant", "abc"),
        ("user", "Shorter"),
    ]
    assert dialogue.answer == {"role": "assistant", "content": "a"}
    assert (dialogue.line, unanswered.line, wildchat.line) == (2, 23, 36)
    assert unanswered.answer is None
    assert wildchat.answer == {"role": "assistant", "content": "Salut"}


def test_litellm() -> None:
    called, redacted, failed = read("litellm.jsonl")
    assert (called.slice, called.session, called.timestamp) == ("support", "t-1", 1731000000.25)
    assert called.answer == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert called.body is not None
    # Parameters that shape the prompt are taken over; accounts and headers are not.
    assert set(called.body) == {"model", "temperature", "tools", "messages"}
    assert (redacted.has_text, redacted.prompt_tokens, redacted.output_tokens) == (False, 40, 5)
    assert failed.body == {"model": "qwen", "max_tokens": 8, "prompt": "def f("}
    assert failed.answer is None


@pytest.mark.parametrize("name", ["langfuse.jsonl", "langfuse.csv"])
def test_langfuse(name: str) -> None:
    chat, completion = read(name)
    assert (chat.id, chat.slice, chat.session) == ("obs-1", "docs", "sess-1")
    # date -u -d '2024-05-29 13:46:19' +%s
    assert chat.timestamp == 1716990379.963
    assert chat.body == {
        "model": "qwen",
        "temperature": 0.5,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "Résumé?"}],
    }
    assert chat.answer == {"role": "assistant", "content": "Oui."}
    assert (chat.prompt_tokens, chat.output_tokens) == (9, 3)
    assert completion.body == {"model": "base", "prompt": "Once upon"}
    assert completion.answer == {"text": " a time"}
    assert completion.session is None


def test_otel_structured_and_textual_attributes_agree() -> None:
    structured, textual, lengths = read("otel.jsonl")
    assert messages(structured)[0] == {"role": "system", "content": "Be brief."}
    expected = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rainy, 57°F"},
    ]
    assert messages(structured)[1:] == messages(textual) == expected
    assert structured.answer == textual.answer == {"role": "assistant", "content": "It rains.", "reasoning": "Say it."}
    assert structured.body is not None
    assert structured.body["tools"] == [
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object"}},
        }
    ]
    assert (structured.timestamp, textual.timestamp) == (1731000000.0, 1731000000.5)
    assert (structured.session, textual.slice) == ("conv-1", "weather")
    # vLLM's own spans hold lengths only.
    assert (lengths.has_text, lengths.id, lengths.prompt_tokens, lengths.output_tokens) == (False, "cmpl-9", 30, 7)


def test_otel_exported_spans() -> None:
    event, indexed = read("otel_span.jsonl")
    assert messages(event)[0]["content"] == [
        {"type": "text", "text": "Joke?"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ]
    assert event.answer == {"role": "assistant", "content": "No."}
    assert event.timestamp == 1731000000.0
    assert messages(indexed) == [{"role": "user", "content": "Hello"}]
    assert indexed.answer == {"role": "assistant", "content": "Hi"}


def test_mooncake_lengths() -> None:
    first, second = read("mooncake.jsonl")
    assert (first.timestamp, first.prompt_tokens, first.output_tokens, first.block_ids) == (0.0, 1040, 30, (0, 1, 2))
    assert (second.timestamp, second.has_text) == (3.052, False)


def test_mooncake_text() -> None:
    chat, completion, payload = read("mooncake_text.jsonl")
    assert chat.body == {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 7}
    assert (chat.timestamp, chat.session) == (0.5, "s")
    assert completion.body == {"prompt": "Once upon", "max_tokens": 3}
    assert payload.body == {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def test_length_tables() -> None:
    azure = read("azure.csv")
    # date -u -d '2023-11-16 18:15:46' +%s
    assert azure[0].timestamp == pytest.approx(1700158546.68059, abs=1e-6)
    assert [(request.prompt_tokens, request.output_tokens, request.line) for request in azure] == [
        (374, 44, 2),
        (396, 109, 3),
    ]
    burst = read("burstgpt.csv")
    assert [(request.timestamp, request.session, request.prompt_tokens) for request in burst] == [
        (5.0, "1", 472),
        (45.5, None, 1087),
    ]


ASKED = {"messages": [{"role": "user", "content": "Hi"}]}
ANSWERED = {"role": "assistant", "content": "Well"}
TEXT_PART = {"type": "text", "content": "Well"}


def choices(reason: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "message": ANSWERED, "finish_reason": reason}]}


def span(**attributes: object) -> dict[str, object]:
    output = {"gen_ai.output.messages": [{"role": "assistant", "parts": [TEXT_PART], "finish_reason": "length"}]}
    named = {f"gen_ai.{name.replace('__', '.')}": value for name, value in attributes.items()}
    given = {"gen_ai.operation.name": "chat", "gen_ai.input.messages": ASKED["messages"]}
    return {"name": "chat", "context": {"span_id": "1"}, "attributes": given | output | named}


@pytest.mark.parametrize(
    ("line", "truncated"),
    [
        ({"body": ASKED, "response": {"body": choices("length")}}, True),
        ({"body": ASKED, "response": {"body": choices("stop")}}, False),
        ({"body": ASKED, "response": {"status_code": 500, "body": choices("length")}}, False),
        ({"call_type": "completion", **ASKED, "response": choices("length")}, True),
        ({"call_type": "completion", **ASKED, "response": choices("stop")}, False),
        ({"type": "GENERATION", "trace_id": "t", "input": ASKED, "output": json.dumps(choices("length"))}, True),
        ({"type": "GENERATION", "trace_id": "t", "input": ASKED, "output": ANSWERED}, False),
        (span(), True),
        (span(response__finish_reasons=["length"]), True),
        (span(response__finish_reasons=["stop"]), False),
        ({**ASKED, "messages": [*ASKED["messages"], ANSWERED]}, False),
    ],
)
def test_an_answer_that_ended_at_its_length_limit_is_told(
    line: dict[str, object], truncated: bool, tmp_path: Path
) -> None:
    path = tmp_path / "line.jsonl"
    path.write_text(json.dumps(line) + "\n")
    (request,) = read_traffic([str(path)])
    assert request.truncated is truncated


@pytest.mark.parametrize("name", FORMAT_OF)
def test_convert_round_trip(name: str, tmp_path: Path) -> None:
    recorded = [request for request in read(name) if request.has_text]
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(json.dumps(batch_line(request)) + "\n" for request in recorded))
    again = list(read_traffic([str(path)])) if recorded else []
    assert [identity(request) for request in again] == [identity(request) for request in recorded]
    assert {request.origin.format for request in again} <= {"openai-batch"}
