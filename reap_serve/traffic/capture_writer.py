"""Captured exchanges to files, in a thread of its own."""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from reap_serve.errors import StorageError
from reap_serve.records import JsonValue
from reap_serve.shown_text import shown_logger
from reap_serve.traffic.captured_line import CaptureError, captured_line

_logger = shown_logger(__name__)
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """The bytes of a request that was answered.

    Attributes:
        path: Path of the endpoint.
        arrived: UTC time of arrival in seconds since 1970.
        request: Body of the request.
        response: Body of the response.
        streamed: Whether the response is a stream of server-sent events.
    """

    path: str
    arrived: float
    request: bytes
    response: bytes
    streamed: bool


class CaptureWriter:
    """Appends exchanges to rotating files of mode 0600; each line is one write.

    Args:
        directory: Where; made with mode 0700 when it is missing.
        allowed_fields: Body fields that are kept.
        max_bytes: Capture files in the directory together; writing stops there.
        file_bytes: A new file is begun when one has so many bytes.
        queue_bytes: Waiting exchanges; further ones are dropped.

    Attributes:
        written: Lines written.
        dropped: Exchanges that were not written, by reason.

    Raises:
        StorageError: The directory cannot be made or written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        allowed_fields: frozenset[str],
        max_bytes: int,
        file_bytes: int,
        queue_bytes: int,
    ) -> None:
        self.written = 0
        self.dropped: dict[str, int] = {}
        self._directory = directory
        self._allowed_fields = allowed_fields
        self._max_bytes = max_bytes
        self._file_bytes = file_bytes
        self._queue_bytes = queue_bytes
        self._waiting: deque[Exchange] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._stopped = False
        self._descriptor: int | None = None
        self._written_bytes = 0
        self._other_bytes = 0
        self._files = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open_file()
        except OSError as error:
            raise StorageError(f"{directory} cannot be written: {error.strerror}", "give another directory") from None
        self._thread = threading.Thread(target=self._run, name="reap-serve-capture", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, exchange: Exchange) -> None:
        """Hands over an exchange; it is dropped when too many bytes wait, or after writing has stopped."""
        size = len(exchange.request) + len(exchange.response)
        with self._changed:
            if self._stopped or self._closing:
                self._drop("writing has stopped")
            elif self._waiting_bytes + size > self._queue_bytes:
                self._drop("too many bytes wait")
            else:
                self._waiting.append(exchange)
                self._waiting_bytes += size
                self._changed.notify()

    def close(self) -> None:
        """Writes what waits, for 10 s at most, and closes the file."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    break
                exchange = self._waiting.popleft()
                self._waiting_bytes -= len(exchange.request) + len(exchange.response)
            self._record(exchange)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self.dropped:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in self.dropped.items())
            _logger.warning("%d requests recorded, dropped: %s", self.written, reasons)

    def _record(self, exchange: Exchange) -> None:
        try:
            line = captured_line(
                exchange.path,
                exchange.arrived,
                exchange.request,
                exchange.response,
                streamed=exchange.streamed,
                allowed_fields=self._allowed_fields,
            )
            self._write(line)
        except CaptureError as error:
            self._drop(str(error))
        except OSError as error:
            self._stop(f"the disk refused: {error.strerror}")

    def _write(self, line: dict[str, JsonValue]) -> None:
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if self._descriptor is None:
            self._drop("writing has stopped")
            return
        if self._written_bytes and self._written_bytes + len(content) > self._file_bytes:
            self._open_file()
        if self._other_bytes + self._written_bytes + len(content) > self._max_bytes:
            self._stop(f"the directory has reached {self._max_bytes} bytes")
            return
        if os.write(self._descriptor, content) != len(content):
            raise OSError(None, "a line was cut short")
        self._written_bytes += len(content)
        self.written += 1

    def _open_file(self) -> None:
        """Begins a file; also counts what others have written to the directory since the last."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._other_bytes = sum(found.stat().st_size for found in self._directory.glob("capture-*.jsonl"))
        self._written_bytes = 0
        begun = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self._directory / f"capture-{begun}-{os.getpid()}-{self._files:04d}.jsonl"
        self._files += 1
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def _stop(self, reason: str) -> None:
        _logger.warning("recording of requests stops: %s", reason)
        self._stopped = True
        self._drop(reason)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _drop(self, reason: str) -> None:
        with self._changed:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
