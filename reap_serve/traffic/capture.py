"""Opt-in recording of a vLLM server's own traffic, as OpenAI Batch lines with their answers.

    REAP_SERVE_CAPTURE_DIR=/var/lib/capture vllm serve MODEL --middleware reap_serve.traffic.capture.CaptureMiddleware

Without that variable the middleware passes everything through. It stores prompts and answers in plain text: whoever
sets it decides that this is allowed. The further variables are the attributes of `CaptureSettings`.

The bytes of request and response pass unchanged and undelayed; copies go to a bounded queue, and a thread parses and
writes them. When the queue, a size limit or the disk is full, records are dropped and counted, never the service.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from reap_serve.errors import RequestError
from reap_serve.shown_text import shown_logger
from reap_serve.traffic.capture_writer import CaptureWriter, Exchange

Scope = MutableMapping[str, object]
Message = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

PREFIX = "REAP_SERVE_CAPTURE_"
_PATHS = ("/v1/chat/completions", "/v1/completions")
_logger = shown_logger(__name__)

# What shapes the prompt or the answer. Names and accounts (`user`, `metadata`, `safety_identifier`) are left out.
_DEFAULT_FIELDS = (
    "add_generation_prompt,chat_template,chat_template_kwargs,continue_final_message,documents,frequency_penalty,"
    "function_call,functions,logit_bias,max_completion_tokens,max_tokens,messages,min_p,model,n,parallel_tool_calls,"
    "presence_penalty,prompt,reasoning_effort,repetition_penalty,response_format,seed,stop,structured_outputs,"
    "temperature,tool_choice,tools,top_k,top_p"
)


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """What is recorded, and where. Each attribute is read from `REAP_SERVE_CAPTURE_<NAME>`.

    Attributes:
        dir: Directory of the files; made with mode 0700 when it is missing. Files have mode 0600.
        fraction: Probability of recording a request.
        max_bytes: Stop when the capture files in the directory have so many bytes together.
        file_bytes: Begin a new file when one has so many bytes.
        max_exchange_bytes: Leave out a request whose body or answer is longer.
        queue_bytes: Memory for records that wait for the disk; further ones are dropped.
        fields: Allow-list of body fields, separated by commas.
    """

    dir: str
    fraction: float = 1.0
    max_bytes: int = 1 << 30
    file_bytes: int = 64 << 20
    max_exchange_bytes: int = 8 << 20
    queue_bytes: int = 64 << 20
    fields: str = _DEFAULT_FIELDS

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """The settings in environment variables; None when the directory is not set.

        Raises:
            RequestError: A value is out of range, or a variable with our prefix is unknown.
        """
        given = {key[len(PREFIX) :].lower(): value for key, value in environment.items() if key.startswith(PREFIX)}
        if not given.get("dir"):
            return None
        types = {"dir": str, "fraction": float, "fields": str}
        known = {item.name for item in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise RequestError(
                f"{PREFIX}{unknown[0].upper()} is not known",
                f"known are {', '.join(PREFIX + name.upper() for name in sorted(known))}",
            )
        try:
            settings = cls(**{name: types.get(name, int)(value) for name, value in given.items()})
        except ValueError as error:
            raise RequestError(f"a variable {PREFIX}... is not a number: {error}", "mend it") from None
        if not 0.0 < settings.fraction <= 1.0:
            raise RequestError(f"{PREFIX}FRACTION={settings.fraction} is not in (0, 1]", "give a fraction such as 0.01")
        return settings


class CaptureMiddleware:
    """ASGI middleware that copies chats and completions, with their answers, to files.

    Recorded are requests that were answered whole with status 200. Sampling is independent for each request.

    Args:
        app: The application behind.

    Raises:
        RequestError: The environment variables are wrong.
        StorageError: The directory cannot be made or written; the server does not start.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._settings = CaptureSettings.from_environment(os.environ)
        self._writer: CaptureWriter | None = None
        if self._settings is not None:
            self._writer = CaptureWriter(
                Path(self._settings.dir),
                allowed_fields=frozenset(name.strip() for name in self._settings.fields.split(",")),
                max_bytes=self._settings.max_bytes,
                file_bytes=self._settings.file_bytes,
                queue_bytes=self._settings.queue_bytes,
            )
            _logger.warning(
                "recording prompts and answers of %.4g of the requests in %s",
                self._settings.fraction,
                self._settings.dir,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if self._writer is None or self._settings is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "lifespan":
            try:
                await self._app(scope, receive, send)
            finally:
                self._writer.close()
        elif not self._is_recorded(scope, self._settings.fraction):
            await self._app(scope, receive, send)
        else:
            recording = _Recording(str(scope["path"]), self._settings.max_exchange_bytes)
            await self._app(scope, recording.receiving(receive), recording.sending(send))
            if (exchange := recording.exchange()) is not None:
                self._writer.put(exchange)

    @staticmethod
    def _is_recorded(scope: Scope, fraction: float) -> bool:
        return (
            scope["type"] == "http"
            and scope.get("method") == "POST"
            and str(scope.get("path")).endswith(_PATHS)
            and random.random() < fraction
        )


class _Recording:
    """Copies of the bytes of one request and its response."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._arrived = time.time()
        self._request = bytearray()
        self._response = bytearray()
        self._status: int | None = None
        self._streamed = False
        self._whole = False
        self._too_long = False

    def receiving(self, receive: Receive) -> Receive:
        """`receive`, with a copy of the request's body kept."""

        async def receive_and_keep() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._keep(self._request, message.get("body"))
            return message

        return receive_and_keep

    def sending(self, send: Send) -> Send:
        """`send`, with a copy of the response's body kept."""

        async def send_and_keep(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                status = message.get("status")
                self._status = status if isinstance(status, int) else None
                self._streamed = _content_type(message).startswith(b"text/event-stream")
            elif message["type"] == "http.response.body" and self._status == 200:
                self._keep(self._response, message.get("body"))
                self._whole = not message.get("more_body", False)

        return send_and_keep

    def exchange(self) -> Exchange | None:
        """What is to be written; None for a request that failed, broke off, or is too long."""
        if self._status != 200 or not self._whole or self._too_long:
            return None
        return Exchange(
            path=self._path,
            arrived=self._arrived,
            request=bytes(self._request),
            response=bytes(self._response),
            streamed=self._streamed,
        )

    def _keep(self, kept: bytearray, part: object) -> None:
        if self._too_long or not isinstance(part, (bytes, bytearray)):
            return
        if len(kept) + len(part) > self._max_bytes:
            self._too_long = True
            self._request.clear()
            self._response.clear()
        else:
            kept += part


def _content_type(message: Message) -> bytes:
    headers = message.get("headers")
    for name, value in headers if isinstance(headers, (list, tuple)) else ():
        if bytes(name).lower() == b"content-type":
            return bytes(value)
    return b""
