"""Records of every format as small as they can be, for the tests of what is read of them."""

from __future__ import annotations

import json
from pathlib import Path

from reap_serve.errors import TrafficError
from reap_serve.traffic.convert import write_batch
from reap_serve.traffic.malformed import Malformed
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.request import Request

ASK = "Which bridge is oldest?"
SAY = "The stone one."
TOOL = {"name": "look_up", "description": "finds a bridge", "parameters": {"type": "object", "properties": {}}}
CHAT_TOOL = {"type": "function", "function": TOOL}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"town":"Kelheim"}'}}
USER = {"role": "user", "content": ASK}
ASSISTANT = {"role": "assistant", "content": SAY}
SYSTEM = {"role": "system", "content": "Answer from the register."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "built 1146"}
# Numbered attributes of a span.
P, C = "gen_ai.prompt", "gen_ai.completion"
ASKED_FLAT = {f"{P}.0.role": "user", f"{P}.0.content": ASK}
ANSWERED_FLAT = {f"{C}.0.role": "assistant", f"{C}.0.content": SAY}
USAGE = {"gen_ai.usage.input_tokens": 6, "gen_ai.usage.output_tokens": 4}
# A whole span of OpenInference.
OPENINFERENCE = {
    "openinference.span.kind": "LLM",
    "llm.input_messages.0.message.role": "user",
    "llm.input_messages.0.message.content": ASK,
    "llm.output_messages.0.message.role": "assistant",
    "llm.output_messages.0.message.content": SAY,
}


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def batch(messages: object, answer: object = None, **body: object) -> dict[str, object]:
    line: dict[str, object] = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, **body},
    }
    if answer is not None:
        line["response"] = {"status_code": 200, "body": {"choices": [{"index": 0, "message": answer}]}}
    return line


def observation(given: object, output: object, **more: object) -> dict[str, object]:
    return {
        "id": "o",
        "type": "GENERATION",
        "trace_id": "t",
        "start_time": "2026-01-01T00:00:00Z",
        "input": given,
        "output": output,
        **more,
    }


def payload(messages: object, response: object, **more: object) -> dict[str, object]:
    return {"id": "p", "call_type": "acompletion", "messages": messages, "response": response, "startTime": 1.0, **more}


def span(attributes: dict[str, object], **more: object) -> dict[str, object]:
    return {"name": "chat", "context": {"span_id": "2"}, "attributes": attributes, **more}


def shares(*turns: tuple[str, object], **more: object) -> dict[str, object]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **more}


def read_records(path: Path, *records: object, **options: object) -> tuple[list[Request], Malformed]:
    """The requests in some records, and the tally of the malformed ones."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    file = path / "records.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    malformed = Malformed()
    found: list[Request] = []
    try:
        found.extend(
            read_traffic([str(file)], skip_malformed=True, require_text=False, malformed=malformed, **options)  # type: ignore[arg-type]
        )
    except TrafficError:
        # No request at all.
        assert malformed.total or not found
    return found, malformed


KEPT = ("body", "kind", "slice", "answer", "truncated", "timestamp", "session", "id")


def identity(request: Request) -> dict[str, object]:
    """What a round trip keeps: everything but the origin, and lengths of unanswered requests."""
    kept = {name: getattr(request, name) for name in KEPT}
    return kept | ({"lengths": (request.prompt_tokens, request.output_tokens)} if request.answer else {})


def read_one(path: Path, record: object) -> tuple[object, object]:
    """Messages and answer of a record, which come back from what `convert` writes of it, too."""
    (found,), malformed = read_records(path, json.dumps(record) if isinstance(record, dict) else record)
    assert not malformed.total, str(malformed)
    assert found.body is not None
    converted = path / "converted.jsonl"
    with converted.open("wb") as stream:
        write_batch([found], stream)
    (again,), _ = read_records(path, converted.read_text())
    assert identity(again) == identity(found)
    return found.body["messages"], found.answer
