"""Bytes of a traffic file: from a path or standard input, plain, gzip or zstd, by its first bytes."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from reap_serve.errors import InputFileError

if TYPE_CHECKING:
    from typing_extensions import Buffer

STDIN = "-"
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BUFFER_BYTES = 1 << 20
# Little at a time: traffic repeats itself, and all that a piece decompresses to is held.
_COMPRESSED_BYTES = 1 << 14


@contextlib.contextmanager
def open_source(path: str) -> Iterator[io.BufferedReader]:
    """The uncompressed bytes of a file, as a buffered stream.

    Errors of the disk and of the decompressor that come up while the block reads become an InputFileError.

    Args:
        path: A file, or `-` for standard input.

    Raises:
        InputFileError: The file is missing, unreadable, truncated or corrupt, or the zstd library is absent.
    """
    with contextlib.ExitStack() as stack:
        try:
            yield _uncompressed(_open(path, stack), stack)
        except FileNotFoundError:
            raise InputFileError(f"{path} does not exist", "check the path") from None
        except _decompression_errors() as error:
            raise InputFileError(
                f"{path} is truncated or corrupt: {error}", "copy or compress the file again"
            ) from None
        except OSError as error:
            raise InputFileError(f"{path} cannot be read: {error.strerror or error}", "check the file") from None


def _open(path: str, stack: contextlib.ExitStack) -> io.BufferedReader:
    if path == STDIN:
        return cast(io.BufferedReader, sys.stdin.buffer)
    # A regular file opens as a BufferedReader, for which the buffer size is given.
    return stack.enter_context(cast(io.BufferedReader, open(path, "rb", buffering=_BUFFER_BYTES)))


def _uncompressed(handle: io.BufferedReader, stack: contextlib.ExitStack) -> io.BufferedReader:
    magic = handle.peek(4)[:4]
    if magic.startswith(_GZIP_MAGIC):
        stream: io.RawIOBase = cast(io.RawIOBase, stack.enter_context(gzip.GzipFile(fileobj=handle)))
    elif magic == _ZSTD_MAGIC:
        stream = _ZstdFrames(handle)
    else:
        return handle
    return io.BufferedReader(stream, _BUFFER_BYTES)


class _ZstdFrames(io.RawIOBase):
    """Uncompressed bytes of one or more zstd frames.

    The library's own stream reader ends a truncated file without an error.
    """

    def __init__(self, handle: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputFileError(
                "the file is compressed with zstd and the zstandard package is not installed",
                "pip install 'reap-serve[traffic]', or decompress the file",
            ) from None
        self._handle = handle
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._compressed = b""
        self._ready = memoryview(b"")
        self._inside = False

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fills a buffer; 0 at the end.

        Raises:
            EOFError: The last frame is not whole.
        """
        while not self._ready:
            if not self._compressed and not (compressed := self._handle.read1(_COMPRESSED_BYTES)):
                if self._inside:
                    raise EOFError("the last zstd frame is not whole")
                return 0
            self._ready = memoryview(self._frame.decompress(self._compressed or compressed))
            self._inside = not self._frame.eof
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
        view = memoryview(buffer)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decompression_errors() -> tuple[type[Exception], ...]:
    zstandard = sys.modules.get("zstandard")
    zstd_errors = () if zstandard is None else (cast("type[Exception]", zstandard.ZstdError),)
    return (EOFError, zlib.error, gzip.BadGzipFile, *zstd_errors)
