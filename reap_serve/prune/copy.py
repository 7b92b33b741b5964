"""Moves bytes between files through a bounded buffer, and lets a witness see them on their way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from reap_serve.errors import StorageError

PIECE_BYTES = 4 << 20
READ_AHEAD_BYTES = 64 << 20
# Small enough to stay in a core's cache between reading, hashing and writing: the bytes then cross memory as often as
# in a plain copy.
BUFFER_BYTES = 512 << 10


class Copier:
    """Appends runs of a source file to a destination file.

    The kernel could copy by itself, but then someone would have to read the bytes a second time to know them.

    Args:
        source: Descriptor open for reading.
        destination: Descriptor open for writing.
        position: Where in the destination the next byte goes.
        witness: Called with each piece, in order.
    """

    def __init__(
        self, source: int, destination: int, position: int, witness: Callable[[memoryview], None] = lambda piece: None
    ) -> None:
        self._source = source
        self._destination = destination
        self.position = position
        self._witness = witness
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def append(self, runs: Iterable[tuple[int, int]]) -> Iterator[int]:
        """Copies runs (offset, bytes) one after the other.

        Yields:
            The bytes copied by each step.

        Raises:
            StorageError: The source ended early.
            OSError: The disk refused.
        """
        for offset, length in _read_ahead(self._source, runs):
            remaining = length
            while remaining:
                copied = self._copy(offset, remaining)
                offset, remaining = offset + copied, remaining - copied
                yield copied

    def write(self, content: bytes) -> None:
        """Appends bytes that do not come from the source."""
        self._put(memoryview(content))

    def _copy(self, offset: int, length: int) -> int:
        view = self._buffer[: min(length, len(self._buffer))]
        count = _require_some(os.preadv(self._source, [view], offset), offset)
        self._put(view[:count])
        return count

    def _put(self, piece: memoryview) -> None:
        self._witness(piece)
        written = 0
        while written < piece.nbytes:
            written += os.pwrite(self._destination, piece[written:], self.position + written)
        self.position += written


def _read_ahead(source: int, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same bytes in pieces, each announced to the system before its turn.

    The system's own read-ahead would fetch the gaps between the runs too, which hold as much as the runs when half of
    the experts go.
    """
    if not hasattr(os, "posix_fadvise"):
        yield from runs
        return
    os.posix_fadvise(source, 0, 0, os.POSIX_FADV_RANDOM)
    announced: deque[tuple[int, int]] = deque()
    announced_bytes = 0
    for start, total in runs:
        for offset in range(start, start + total, PIECE_BYTES):
            length = min(PIECE_BYTES, start + total - offset)
            os.posix_fadvise(source, offset, length, os.POSIX_FADV_WILLNEED)
            announced.append((offset, length))
            announced_bytes += length
            while announced_bytes > READ_AHEAD_BYTES:
                piece = announced.popleft()
                announced_bytes -= piece[1]
                yield piece
    yield from announced


def _require_some(copied: int, offset: int) -> int:
    if copied == 0:
        raise StorageError(
            f"the source ended at byte {offset}, before its header said", "leave it unchanged and run the command again"
        )
    return copied
