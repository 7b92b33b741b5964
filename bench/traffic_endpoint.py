"""An OpenAI endpoint that answers at once with made-up tokens, and notes when each request arrived.

It takes the place of a server where the client is measured. It speaks as much HTTP/1.1 as the openai package needs:
`GET /v1/models`, and streamed or whole answers to `POST /v1/chat/completions` and `/v1/completions`.

    python bench/traffic_endpoint.py [--tokens N] [--gap-seconds S] [--fail-every K]

It prints one line `{"port": P}` when it listens; on SIGTERM it prints `{"arrivals": [...], "bodies": [...]}`: seconds
on the machine's monotonic clock (`time.monotonic`, shared by all processes) at which each request's head was read, and
the requests' bodies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time

MODEL = "made-up"


class MadeUpEndpoint:
    """Answers requests and keeps what arrived.

    Args:
        tokens: Pieces of each answer.
        gap_seconds: Pause before each piece.
        fail_every: Every so many requests one is answered with status 500; 0 for none.
    """

    def __init__(self, tokens: int, gap_seconds: float, fail_every: int) -> None:
        self.arrivals: list[float] = []
        self.bodies: list[dict[str, object]] = []
        self._tokens = tokens
        self._gap_seconds = gap_seconds
        self._fail_every = fail_every

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the requests of one connection until it closes."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                arrived = time.monotonic()
                await self._answer(head, reader, writer, arrived)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, arrived: float
    ) -> None:
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        if method == "GET":
            await _send_json(writer, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            return
        body = json.loads(await reader.readexactly(_content_length(head)))
        self.arrivals.append(arrived)
        self.bodies.append(body)
        if self._fail_every and len(self.arrivals) % self._fail_every == 0:
            await _send_json(writer, 500, {"error": {"message": "made to fail"}})
            return
        await self._stream(writer, chat=path.endswith("chat/completions"))

    async def _stream(self, writer: asyncio.StreamWriter, *, chat: bool) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if chat:
            _send_event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for _ in range(self._tokens):
            if self._gap_seconds:
                await asyncio.sleep(self._gap_seconds)
            piece = {"delta": {"content": "a "}} if chat else {"text": "a "}
            _send_event(writer, {"choices": [{"index": 0, **piece}]})
            await writer.drain()
        _send_event(writer, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": self._tokens}})
        _send_chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


def _send_event(writer: asyncio.StreamWriter, event: dict[str, object]) -> None:
    _send_chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


def _send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def _send_json(writer: asyncio.StreamWriter, status: int, document: dict[str, object]) -> None:
    content = json.dumps(document).encode()
    writer.write(
        f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    await writer.drain()


async def _main(arguments: argparse.Namespace) -> None:
    endpoint = MadeUpEndpoint(arguments.tokens, arguments.gap_seconds, arguments.fail_every)
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0, limit=1 << 24)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await stopped.wait()
    print(json.dumps({"arrivals": endpoint.arrivals, "bodies": endpoint.bodies}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--gap-seconds", type=float, default=0.0)
    parser.add_argument("--fail-every", type=int, default=0)
    asyncio.run(_main(parser.parse_args()))
    sys.exit(0)
