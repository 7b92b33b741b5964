"""Bytes of a traffic file as UTF-8: from a path or standard input, by its first bytes.

Read are plain files, gzip, bzip2, xz and zstd, zip archives of text files, and UTF-16 and UTF-32 text; what else is
known is refused by its name.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

from reap_serve.errors import InputFileError
from reap_serve.traffic.source_kinds import SIGNATURE_BYTES, foreign_kind, text_encoding

if TYPE_CHECKING:
    from typing_extensions import Buffer

STDIN = "-"
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BZIP2_MAGIC = b"BZh"
_XZ_MAGIC = b"\xfd7zXZ\x00"
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
# Compressed inside compressed: a zip of gzip files is met, more is not.
_LAYERS = 3
_BUFFER_BYTES = 1 << 20
# Little at a time: traffic repeats itself, and all that a piece decompresses to is held.
_COMPRESSED_BYTES = 1 << 14


@contextlib.contextmanager
def open_source(path: str, on_bytes: Callable[[int], None] | None = None) -> Iterator[io.BufferedReader]:
    """The uncompressed bytes of a file in UTF-8, as a buffered stream.

    Errors of the disk and of the decompressor that come up while the block reads become an InputFileError.

    Args:
        path: A file, or `-` for standard input.
        on_bytes: Called with the bytes taken from a file by each read, before they are decompressed.

    Raises:
        InputFileError: The file is missing, unreadable, truncated or corrupt, of a kind that is not read, or the zstd
            library is absent.
    """
    with contextlib.ExitStack() as stack:
        try:
            yield _readable(_open(path, stack, on_bytes), path, stack)
        except FileNotFoundError:
            raise InputFileError(f"{path} does not exist", "check the path") from None
        except UnicodeDecodeError as error:
            raise InputFileError(
                f"{path} is not whole as {error.encoding.upper()}", "write it again as UTF-8"
            ) from None
        except _decompression_errors() as error:
            raise InputFileError(
                f"{path} is truncated or corrupt: {error}", "copy or compress the file again"
            ) from None
        except OSError as error:
            raise InputFileError(f"{path} cannot be read: {error.strerror or error}", "check the file") from None


def _open(path: str, stack: contextlib.ExitStack, on_bytes: Callable[[int], None] | None) -> io.BufferedReader:
    if path == STDIN:
        return cast(io.BufferedReader, sys.stdin.buffer)
    raw = io.FileIO(path) if on_bytes is None else _CountedFile(path, on_bytes)
    return stack.enter_context(io.BufferedReader(raw, _BUFFER_BYTES))


class _CountedFile(io.FileIO):
    """A file that tells how many bytes are read."""

    def __init__(self, path: str, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def readinto(self, buffer: Buffer) -> int | None:
        """Fills a buffer; 0 at the end."""
        count = super().readinto(buffer)
        self._on_bytes(count or 0)
        return count


def _readable(handle: io.BufferedReader, path: str, stack: contextlib.ExitStack) -> io.BufferedReader:
    for _ in range(_LAYERS):
        inner = _uncompressed(handle, path, stack)
        if inner is None:
            break
        handle = io.BufferedReader(inner, _BUFFER_BYTES)
    head = handle.peek(SIGNATURE_BYTES)[:SIGNATURE_BYTES]
    kind = foreign_kind(head)
    if kind is not None:
        raise InputFileError(f"{path} is {kind.name}, which is not read", kind.remedy)
    encoding = text_encoding(head)
    return handle if encoding is None else io.BufferedReader(_Transcoded(handle, encoding), _BUFFER_BYTES)


def _uncompressed(handle: io.BufferedReader, path: str, stack: contextlib.ExitStack) -> io.RawIOBase | None:
    """The stream inside a compressed one; None where it is not compressed."""
    magic = handle.peek(6)[:6]
    if magic.startswith(_GZIP_MAGIC):
        return cast(io.RawIOBase, stack.enter_context(gzip.GzipFile(fileobj=handle)))
    if magic.startswith(_ZSTD_MAGIC):
        return _ZstdFrames(handle)
    if magic.startswith(_BZIP2_MAGIC) and magic[3:4].isdigit():
        return cast(io.RawIOBase, stack.enter_context(bz2.BZ2File(handle)))
    if magic.startswith(_XZ_MAGIC):
        return cast(io.RawIOBase, stack.enter_context(lzma.LZMAFile(handle)))
    if magic.startswith(_ZIP_MAGIC):
        return _ZipMembers(_archive(handle, path, stack), path)
    return None


def _archive(handle: io.BufferedReader, path: str, stack: contextlib.ExitStack) -> zipfile.ZipFile:
    if not handle.seekable():
        raise InputFileError(f"{path} is a zip archive, which is not read from a pipe", "give the file by its name")
    try:
        return stack.enter_context(zipfile.ZipFile(handle))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise InputFileError(
            f"{path} is a zip archive that is truncated or corrupt: {error}", "copy it again"
        ) from None


class _ZipMembers(io.RawIOBase):
    """The files of a zip archive, one after the other, each ended by a line break."""

    def __init__(self, archive: zipfile.ZipFile, path: str) -> None:
        names = [info for info in archive.infolist() if not info.is_dir() and "__MACOSX/" not in info.filename]
        inside = [info.filename for info in names]
        if any(name.endswith((".xml", ".rels")) for name in inside):
            raise InputFileError(f"{path} is an office document, which is not read", "export it as CSV")
        if not inside:
            raise InputFileError(f"{path} is an empty zip archive", "give an archive with traffic in it")
        if any(info.flag_bits & 1 for info in names):
            raise InputFileError(f"{path} is a zip archive with a password", "unpack it and give the files inside")
        if len(names) > 1 and not all(name.endswith((".jsonl", ".ndjson", ".jsonlines")) for name in inside):
            raise InputFileError(
                f"{path} is a zip archive of {len(names)} files that are not all JSON lines",
                "unpack it and give the files inside",
            )
        self._archive = archive
        self._waiting = names
        self._member: io.BufferedIOBase | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fills a buffer; 0 at the end.

        Raises:
            zipfile.BadZipFile: A file is corrupt.
        """
        view = memoryview(buffer)
        while True:
            if self._member is None:
                if not self._waiting:
                    return 0
                self._member = cast(io.BufferedIOBase, self._archive.open(self._waiting.pop(0)))
            read = self._member.read(len(view))
            if read:
                view[: len(read)] = read
                return len(read)
            self._member.close()
            self._member = None
            if self._waiting:
                view[:1] = b"\n"
                return 1


class _Transcoded(io.RawIOBase):
    """Text of another encoding as UTF-8; half surrogates stay to be found as no UTF-8."""

    def __init__(self, handle: io.BufferedReader, encoding: str) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._ready = b""
        self._begun = False

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fills a buffer; 0 at the end.

        Raises:
            UnicodeDecodeError: The text is not of that encoding.
        """
        while not self._ready:
            piece = self._handle.read1(_BUFFER_BYTES)
            text = self._decoder.decode(piece, final=not piece)
            if not self._begun and text:
                text, self._begun = text.removeprefix("\ufeff"), True
            self._ready = text.encode("utf-8", "surrogatepass")
            if not piece and not self._ready:
                return 0
        view = memoryview(buffer)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


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
    return (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, *zstd_errors)
