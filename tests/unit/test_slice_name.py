"""One rule for the names of slices, at every place where one enters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap_serve.errors import TrafficError
from reap_serve.record.requests import DEFAULT_SLICE, Requests
from reap_serve.serve.mask_admission import AdmissionError, settle
from reap_serve.slice_name import is_slice_name
from reap_serve.statistics.record import Header
from reap_serve.traffic.captured_line import captured_line
from reap_serve.traffic.read import parse_slices, read_traffic

SOUND = ["code", "a b", "Übersetzung", "[/x]", "a=b", "x" * 64]
HALF_A_PAIR = "a\ud800b"
BROKEN = ["", "x" * 65, "a\nb", "a\x1b[31mb", "a\tb", "a\u202eb", HALF_A_PAIR, "a\u2028b", "\x7f", "a\x00"]


def test_the_rule() -> None:
    assert all(map(is_slice_name, SOUND))
    assert not any(map(is_slice_name, [*BROKEN, None, 3, ["a"]]))


def line_of(format: str, name: str) -> dict[str, object]:
    messages = [{"role": "user", "content": "hi"}]
    ours = {"reap_slice": name}
    return {
        "openai-batch": {"url": "/v1/chat/completions", "body": {"messages": messages, "metadata": ours}},
        "requests": {"messages": messages, "metadata": ours},
        "litellm": {"call_type": "acompletion", "messages": messages, "metadata": {"requester_metadata": ours}},
        "langfuse": {"trace_id": "t", "input": messages, "output": "hello", "metadata": ours},
        "otel": {
            "name": "chat",
            "attributes": {
                "gen_ai.operation.name": "chat",
                "gen_ai.input.messages": json.dumps([{"role": "user", "parts": [{"type": "text", "content": "hi"}]}]),
                **ours,
            },
        },
    }[format]


@pytest.mark.parametrize("format", ["openai-batch", "requests", "litellm", "langfuse", "otel"])
def test_a_recorded_line(format: str, tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    for name in SOUND:
        file.write_text(json.dumps(line_of(format, name)) + "\n")
        (request,) = read_traffic([str(file)], format=format)
        assert request.slice == name
    # An empty name is none at all where a source's own fields may be empty; half a surrogate pair is replaced.
    for name in [name for name in BROKEN[1:] if name != HALF_A_PAIR]:
        file.write_text(json.dumps(line_of(format, name)) + "\n")
        with pytest.raises(TrafficError, match=r":1: .*1 to 64 printable characters"):
            list(read_traffic([str(file)], format=format))
    file.write_text(json.dumps(line_of(format, HALF_A_PAIR)) + "\n")
    (request,) = read_traffic([str(file)], format=format)
    assert request.slice == "a\ufffdb"


def test_an_option() -> None:
    assert parse_slices(["code=a.jsonl", "code=b.jsonl", "[/x]=c"]) == {"code": ["a.jsonl", "b.jsonl"], "[/x]": ["c"]}
    for name in BROKEN[1:]:
        with pytest.raises(TrafficError, match="1 to 64 printable characters"):
            parse_slices([f"{name}=a.jsonl"])


def test_a_served_request() -> None:
    for name in SOUND:
        assert settle({"reap_slice": name}, lambda plan: None) == ({"reap_slice": name}, None)
    for broken in (*BROKEN, 3, ["a"]):
        with pytest.raises(AdmissionError, match="1 to 64 printable characters"):
            settle({"reap_slice": broken}, lambda plan: None)


def test_an_engine_without_the_gate() -> None:
    requests = Requests(max_slices=16)
    for number, name in enumerate([*BROKEN, "code"]):
        requests.add(str(number), 1, {"reap_slice": name})
    assert requests.slices == [DEFAULT_SLICE, "code"]


def test_a_captured_exchange() -> None:
    answer = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}}]}).encode()

    def captured(name: str) -> object:
        body = json.dumps({"messages": [], "metadata": {"reap_slice": name}}).encode()
        path = "/v1/chat/completions"
        line = captured_line(path, 0.0, body, answer, streamed=False, allowed_fields=frozenset({"messages"}))
        return line["body"]

    assert captured("code") == {"messages": [], "metadata": {"reap_slice": "code", "reap_timestamp": "0.0"}}
    assert captured("a\x1bb") == {"messages": [], "metadata": {"reap_timestamp": "0.0"}}


@pytest.mark.parametrize("name", BROKEN)
def test_a_statistics_file(name: str) -> None:
    with pytest.raises(ValueError, match=r"1 to 64 printable characters|unicode"):
        Header.model_validate({"slices": [name]})
