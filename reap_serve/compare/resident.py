"""Host memory of a served model: the processes of its server, looked at once a second."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil

SAMPLE_SECONDS = 1.0


class ResidentMemory:
    """Watches a process and all its children until the block ends.

    What is counted is the proportional set size where the system tells it (pages that n processes share count 1/n in
    each), else the resident set size. Memory of devices is not in it.

    Args:
        pid: Of the server.

    Attributes:
        first_bytes: At the start of the block.
        peak_bytes: The largest seen since.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="resident-memory", daemon=True)
        self.first_bytes = _tree_bytes(pid)
        self.peak_bytes = self.first_bytes

    def __enter__(self) -> ResidentMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> int:
        """The largest seen, now included."""
        self.peak_bytes = max(self.peak_bytes, _tree_bytes(self._pid))
        return self.peak_bytes

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.look()


def _tree_bytes(pid: int) -> int:
    total = 0
    # Processes come and go while they are looked at.
    with contextlib.suppress(psutil.Error):
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
    return total
