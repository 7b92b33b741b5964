"""Records of every format as small as they can be, for the tests of what is read of them."""

from __future__ import annotations

import json
from pathlib import Path

from reap_serve.errors import TrafficError
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
