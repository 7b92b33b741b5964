"""Bytes of a traffic file: from a path or standard input, plain, gzip or zstd, by its first bytes."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from reap_serve.errors import InputFileError

STDIN = "-"
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BUFFER_BYTES = 1 << 20


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
        stream: BinaryIO = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=handle)))
    elif magic == _ZSTD_MAGIC:
        stream = _zstd_stream(handle)
    else:
        return handle
    return io.BufferedReader(cast(io.RawIOBase, stream), _BUFFER_BYTES)


def _zstd_stream(handle: io.BufferedReader) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise InputFileError(
            "the file is compressed with zstd and the zstandard package is not installed",
            "pip install 'reap-serve[traffic]', or decompress the file",
        ) from None
    return cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(handle, read_across_frames=True))


def _decompression_errors() -> tuple[type[Exception], ...]:
    zstandard = sys.modules.get("zstandard")
    zstd_errors = () if zstandard is None else (cast("type[Exception]", zstandard.ZstdError),)
    return (EOFError, zlib.error, gzip.BadGzipFile, *zstd_errors)
