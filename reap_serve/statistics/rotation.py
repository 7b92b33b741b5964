"""Live writing: a growing set of whole files in a directory, made by a thread that serving never waits for.

A recorder offers the sums since its last offer; each interval makes one file. What could not be written stays in memory
and goes into the next file. Each file is there whole or not at all, so `kill -9` costs the tokens since the last one.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from reap_serve.shown_text import shown_logger
from reap_serve.statistics.file import write_statistics
from reap_serve.statistics.merge import merge
from reap_serve.statistics.privacy import MINIMUM_TOKENS_PER_SLICE, withhold_small_slices, without_tokens
from reap_serve.statistics.record import Statistics
from reap_serve.statistics.storage import SUFFIX, is_url

INTERVAL_SECONDS = 60.0
# Partial files of other writers in the directory may be in use; those of killed ones grow old.
STALE_SECONDS = 3600.0
# A file must be there before the interval ends, so the offer comes this share of the interval, and twice the time that
# writing took, before its end.
LEAD_FRACTION = 0.1

_LOG = shown_logger(__name__)


@dataclass(frozen=True, slots=True)
class WriterStatus:
    """What a writer has done so far.

    Attributes:
        files_written: Files in the directory that this writer made.
        tokens_written: Tokens in them.
        tokens_pending: Tokens offered and not written: a write failed, or their slices are below the minimum.
        write_failures: Attempts that failed.
        last_error: Of the latest attempt, None when it succeeded.
    """

    files_written: int
    tokens_written: int
    tokens_pending: int
    write_failures: int
    last_error: str | None


class StatisticsWriter:
    """Writes the statistics of a running server, file by file."""

    def __init__(
        self,
        directory: str,
        interval_seconds: float = INTERVAL_SECONDS,
        minimum_tokens_per_slice: int = MINIMUM_TOKENS_PER_SLICE,
    ) -> None:
        """Starts the writing thread; the directory is made when the first file is.

        Args:
            directory: A local path or an fsspec URL. Writers may share it: names never collide, also after a restart.
            interval_seconds: Time between two files.
            minimum_tokens_per_slice: A slice with fewer tokens since it was last written waits for the next file.
        """
        self._directory = directory.rstrip("/")
        self._interval_seconds = interval_seconds
        self._minimum_tokens = minimum_tokens_per_slice
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self._prefix = f"{self._directory}/{moment}-{uuid.uuid4().hex[:12]}"
        self._offered: list[Statistics] = []
        self._pending: Statistics | None = None
        self._lead_seconds = LEAD_FRACTION * interval_seconds
        self._last_offer = time.monotonic()
        self._files_written = self._tokens_written = self._write_failures = 0
        self._last_error: str | None = None
        self._hand_over = threading.Lock()
        self._flushing = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._remove_stale_partial_files()
        self._thread = threading.Thread(target=self._run, name="reap-serve-statistics", daemon=True)
        self._thread.start()

    @property
    def due(self) -> bool:
        """Whether the recorder should offer its sums now."""
        return time.monotonic() - self._last_offer >= self._interval_seconds - self._lead_seconds

    def offer(self, statistics: Statistics) -> None:
        """Hands over the sums since the last offer; returns at once and never fails.

        The recorder starts again at zero. The arrays belong to the writer from now on; the window's id must be new.
        """
        with self._hand_over:
            self._offered.append(statistics)
            self._last_offer = time.monotonic()
        self._wake.set()

    def flush(self) -> bool:
        """Writes what was offered, in the calling thread.

        Returns:
            False when the write failed; the sums are kept for the next attempt.
        """
        with self._flushing:
            started = time.monotonic()
            try:
                self._write_pending()
            except Exception as error:  # noqa: BLE001 - serving must survive whatever the disk or the store says
                self._write_failures += 1
                if self._last_error is None:
                    _LOG.warning("statistics cannot be written and are kept in memory: %s", error)
                self._last_error = str(error)
                return False
            if self._last_error is not None:
                _LOG.info("statistics are written again")
                self._last_error = None
            lead_seconds = max(LEAD_FRACTION * self._interval_seconds, 2 * (time.monotonic() - started))
            self._lead_seconds = min(lead_seconds, self._interval_seconds / 2)
            return True

    def close(self) -> None:
        """Writes what was offered and stops; slices below the minimum stay unwritten.

        Where something was lost, and nothing that was written says so, a last file without tokens does.
        """
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._thread.join()
        self.flush()
        if self._last_error is None and (tokens := _count_tokens(self._pending)):
            _LOG.info("%d tokens of slices below %d tokens were not written", tokens, self._minimum_tokens)
        self._tell_of_losses()

    def rescue(self) -> None:
        """As `close`, for a process that may be killed at any moment; it may go on all the same."""
        self.flush()
        self._tell_of_losses()

    def status(self) -> WriterStatus:
        """Counters for metrics."""
        with self._hand_over:
            pending = sum(_count_tokens(statistics) for statistics in (*self._offered, self._pending))
        return WriterStatus(self._files_written, self._tokens_written, pending, self._write_failures, self._last_error)

    def _run(self) -> None:
        while not self._closed:
            # Without an offer it still wakes up, to repeat a write that failed.
            self._wake.wait(self._interval_seconds)
            self._wake.clear()
            if not self._closed:
                self.flush()

    def _write_pending(self) -> None:
        with self._hand_over:
            offered, self._offered = self._offered, []
            waiting = offered if self._pending is None else [self._pending, *offered]
        if not waiting:
            return
        self._pending = waiting[0] if len(waiting) == 1 else merge(waiting)
        ready, withheld = withhold_small_slices(self._pending, self._minimum_tokens)
        if ready is not None:
            self._write(ready)
        self._pending = withheld

    def _tell_of_losses(self) -> None:
        with self._flushing:
            if self._pending is None or all(window.complete for window in self._pending.header.windows):
                return
            try:
                self._write(without_tokens(self._pending))
            except Exception as error:  # noqa: BLE001 - the end of a server must not fail
                _LOG.warning("that statistics are incomplete could not be written: %s", error)

    def _write(self, statistics: Statistics) -> None:
        # A write may fail after the file took its name; the next attempt replaces it, so no token counts twice.
        write_statistics(statistics, f"{self._prefix}-{self._files_written:06d}{SUFFIX}", overwrite=True)
        self._files_written += 1
        self._tokens_written += _count_tokens(statistics)

    def _remove_stale_partial_files(self) -> None:
        if is_url(self._directory):
            return
        with contextlib.suppress(OSError):
            for path in Path(self._directory).glob(f".*{SUFFIX}.*.partial"):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()


def _count_tokens(statistics: Statistics | None) -> int:
    return 0 if statistics is None else sum(statistics.tokens_per_slice())
