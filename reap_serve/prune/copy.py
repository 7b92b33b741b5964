"""Moves bytes between files: in the kernel where the system offers it, through a bounded buffer elsewhere."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator

from reap_serve.errors import StorageError

KERNEL_CHUNK_BYTES = 64 << 20
PIECE_BYTES = 4 << 20
READ_AHEAD_BYTES = 64 << 20
BUFFER_BYTES = 4 << 20
# Short runs (router rows, scales) are not worth the kernel's set-up of a copy between files.
SMALL_RUN_BYTES = 256 << 10
# What the kernel answers where it cannot copy between these two files; the buffer can.
NOT_IN_KERNEL = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.EBADF}
)


class Copier:
    """Appends runs of a source file to a destination file.

    Args:
        source: Descriptor open for reading.
        destination: Descriptor open for writing.
        position: Where in the destination the next byte goes.
        in_kernel: Whether to try `copy_file_range` first (reflinks on file systems that share extents).
    """

    def __init__(self, source: int, destination: int, position: int, *, in_kernel: bool = True) -> None:
        self._source = source
        self._destination = destination
        self.position = position
        self._in_kernel = in_kernel and hasattr(os, "copy_file_range")
        self._buffer: bytearray | None = None

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
                self.position += copied
                yield copied

    def _copy(self, offset: int, length: int) -> int:
        if self._in_kernel and length >= SMALL_RUN_BYTES:
            try:
                copied = os.copy_file_range(
                    self._source, self._destination, min(length, KERNEL_CHUNK_BYTES), offset, self.position
                )
            except OSError as error:
                if error.errno not in NOT_IN_KERNEL:
                    raise
                self._in_kernel = False
            else:
                return _require_some(copied, offset)
        return self._copy_through_buffer(offset, length)

    def _copy_through_buffer(self, offset: int, length: int) -> int:
        if self._buffer is None:
            self._buffer = bytearray(BUFFER_BYTES)
        view = memoryview(self._buffer)[: min(length, BUFFER_BYTES)]
        count = _require_some(os.preadv(self._source, [view], offset), offset)
        written = 0
        while written < count:
            written += os.pwrite(self._destination, view[written:count], self.position + written)
        return count


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
