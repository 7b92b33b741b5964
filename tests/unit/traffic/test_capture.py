"""The capture middleware: what it records, that the service never notices, and that the lines can be read again."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Iterable
from pathlib import Path

import pytest

from reap_serve.errors import RequestError
from reap_serve.traffic.capture import PREFIX, CaptureMiddleware, CaptureSettings, Message, Receive, Scope, Send
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.request import Request

BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": "Hello"}],
    "user": "jane",
    "metadata": {"reap_slice": "chat", "account": "7"},
    "stream": True,
}
WHOLE = {
    "id": "chatcmpl-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi!"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


def events(*documents: object, done: bool = True) -> list[bytes]:
    lines = [b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents]
    return [*lines, b"data: [DONE]\n\n"] if done else lines


def delta(**fields: object) -> dict[str, object]:
    return {"id": "chatcmpl-2", "choices": [{"index": 0, "delta": fields}]}


class Server:
    """An ASGI application that answers with given chunks."""

    def __init__(self, chunks: Iterable[bytes], status: int = 200, kind: bytes = b"application/json") -> None:
        self.chunks = list(chunks)
        self.status = status
        self.kind = kind
        self.received = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        more = True
        while more:
            message = await receive()
            body = message["body"]
            assert isinstance(body, bytes)
            self.received += body
            more = bool(message.get("more_body"))
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", self.kind)]})
        for number, chunk in enumerate(self.chunks):
            more = number + 1 < len(self.chunks)
            await send({"type": "http.response.body", "body": chunk, "more_body": more})


def serve(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path | None,
    server: Server,
    bodies: Iterable[object] = (BODY,),
    path: str = "/v1/chat/completions",
    **variables: object,
) -> list[list[bytes]]:
    """Sends bodies, each in two pieces, through the middleware; gives the chunks that came back."""
    if directory is not None:
        monkeypatch.setenv(f"{PREFIX}DIR", str(directory))
    for name, value in variables.items():
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", str(value))
    answers: list[list[bytes]] = []

    async def run() -> None:
        middleware = CaptureMiddleware(server)
        for body in bodies:
            content = json.dumps(body).encode()
            pieces = [content[:10], content[10:]]
            answer: list[bytes] = []

            async def receive(pieces: list[bytes] = pieces) -> Message:
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

            async def send(message: Message, answer: list[bytes] = answer) -> None:
                if message["type"] == "http.response.body":
                    body = message["body"]
                    assert isinstance(body, bytes)
                    answer.append(body)

            await middleware({"type": "http", "method": "POST", "path": path}, receive, send)
            answers.append(answer)
        await middleware({"type": "lifespan"}, receive, send)

    asyncio.run(run())
    return answers


def captured(directory: Path) -> list[Request]:
    files = sorted(str(path) for path in directory.glob("*.jsonl") if path.stat().st_size)
    return list(read_traffic(files)) if files else []


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(f"{PREFIX}DIR", raising=False)
    server = Server([json.dumps(WHOLE).encode()])
    assert serve(monkeypatch, None, server) == [server.chunks]
    assert list(tmp_path.iterdir()) == []


def test_whole_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = json.dumps(WHOLE).encode()
    server = Server([content[:20], content[20:]])
    assert serve(monkeypatch, tmp_path / "capture", server) == [server.chunks]
    assert json.loads(server.received) == BODY
    (request,) = captured(tmp_path / "capture")
    # Neither the account nor the user is in the allow-list; slice and time are ours.
    assert request.body == {"model": "m", "messages": BODY["messages"]}
    assert (request.slice, request.id) == ("chat", "chatcmpl-1")
    assert request.answer == {"role": "assistant", "content": "Hi!"}
    assert (request.prompt_tokens, request.output_tokens) == (3, 2)
    assert request.timestamp is not None
    directory = tmp_path / "capture"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()] == [0o600]


def test_streamed_answer_is_assembled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    chunks = events(
        delta(role="assistant", content=""),
        delta(reasoning="Hm"),
        delta(reasoning="m."),
        delta(content="Hé"),
        {"id": "chatcmpl-2", "choices": [{"index": 1, "delta": {"content": "other choice"}}]},
        delta(content="llo"),
        delta(tool_calls=[call]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
    )
    stream = b"".join(chunks)
    # Cut anywhere, also inside a character.
    server = Server([stream[at : at + 7] for at in range(0, len(stream), 7)], kind=b"text/event-stream; charset=utf-8")
    assert serve(monkeypatch, tmp_path, server) == [server.chunks]
    (request,) = captured(tmp_path)
    assert request.answer == {
        "role": "assistant",
        "content": "Héllo",
        "reasoning": "Hmm.",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    assert request.output_tokens == 9


def test_streamed_completion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chunks = events({"choices": [{"index": 0, "text": " a"}]}, {"choices": [{"index": 0, "text": " time"}]})
    server = Server(chunks, kind=b"text/event-stream")
    serve(monkeypatch, tmp_path, server, [{"prompt": "Once upon"}], path="/v1/completions")
    (request,) = captured(tmp_path)
    assert (request.kind, request.body, request.answer) == ("completion", {"prompt": "Once upon"}, {"text": " a time"})


@pytest.mark.parametrize(
    "server",
    [
        Server([json.dumps({"error": {}}).encode()], status=400),
        Server(events(delta(content="Hi"), done=False), kind=b"text/event-stream"),
        Server(events({"error": {"message": "x"}}), kind=b"text/event-stream"),
        Server([b"not JSON"]),
        Server([json.dumps({"choices": []}).encode()]),
        Server([b"x" * 5000]),
    ],
)
def test_failures_are_not_recorded_and_pass_unchanged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server
) -> None:
    assert serve(monkeypatch, tmp_path, server, max_exchange_bytes=4000) == [server.chunks]
    assert captured(tmp_path) == []


def test_other_endpoints_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server([json.dumps(WHOLE).encode()])
    serve(monkeypatch, tmp_path, server, path="/v1/embeddings")
    assert captured(tmp_path) == []


def test_sampling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server([json.dumps(WHOLE).encode()])
    serve(monkeypatch, tmp_path, server, [BODY] * 1000, fraction=0.3)
    # Binomial(1000, 0.3) has a standard deviation of 14.5; six of them.
    assert abs(len(captured(tmp_path)) - 300) < 87


def test_rotation_and_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server([json.dumps(WHOLE).encode()])
    answers = serve(monkeypatch, tmp_path, server, [BODY] * 50, file_bytes=1000, max_bytes=5000)
    assert answers == [server.chunks] * 50
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert max(sizes) <= 1000
    assert 4000 < sum(sizes) <= 5000
    assert 5 <= len(captured(tmp_path)) < 50


def test_disk_failure_stops_recording_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server([json.dumps(WHOLE).encode()])

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reap_serve.traffic.capture_writer.os.write", full)
    assert serve(monkeypatch, tmp_path, server, [BODY] * 3) == [server.chunks] * 3
    assert captured(tmp_path) == []


@pytest.mark.parametrize(("name", "value"), [("FRACTION", "2"), ("FRACTION", "x"), ("MAX_BYTES", "1GB"), ("TYPO", "1")])
def test_wrong_variables_are_refused(name: str, value: str) -> None:
    with pytest.raises(RequestError, match=PREFIX):
        CaptureSettings.from_environment({f"{PREFIX}DIR": "x", f"{PREFIX}{name}": value})
