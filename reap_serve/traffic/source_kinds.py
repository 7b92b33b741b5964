"""What a file is by its first bytes, where it is neither JSON nor CSV: its name, and what helps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Foreign:
    """A kind of file that is not read.

    Attributes:
        name: What it is.
        remedy: What turns it into a file that is read.
    """

    name: str
    remedy: str


_UNPACK = "unpack it and give the files inside"
_EXPORT = "export it as JSON lines"
# https://en.wikipedia.org/wiki/List_of_file_signatures
_SIGNATURES: tuple[tuple[int, bytes, Foreign], ...] = (
    (0, b"PAR1", Foreign("a Parquet file", "write its rows as JSON lines, such as with pandas.DataFrame.to_json")),
    (0, b"ARROW1", Foreign("an Arrow file", "write its rows as JSON lines, such as with pandas.DataFrame.to_json")),
    (0, b"\xff\xff\xff\xff\x10\x00\x00\x00", Foreign("an Arrow stream", _EXPORT)),
    (0, b"ORC", Foreign("an ORC file", _EXPORT)),
    (0, b"Obj\x01", Foreign("an Avro file", _EXPORT)),
    (0, b"SQLite format 3\x00", Foreign("an SQLite database", _EXPORT)),
    (0, b"\x89HDF", Foreign("an HDF5 file", _EXPORT)),
    (0, b"\x93NUMPY", Foreign("a NumPy file", _EXPORT)),
    (0, b"\x80\x04\x95", Foreign("a pickle", _EXPORT)),
    (0, b"\x80\x05\x95", Foreign("a pickle", _EXPORT)),
    (0, b"%PDF", Foreign("a PDF", _EXPORT)),
    (0, b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", Foreign("a RAR archive", _UNPACK)),
    (257, b"ustar", Foreign("a tar archive", _UNPACK)),
    (0, b"\x04\x22\x4d\x18", Foreign("compressed with LZ4", "decompress it with `lz4 -d`")),
    (0, b"\xff\x06\x00\x00sNaPpY", Foreign("compressed with Snappy", "decompress it")),
    (0, b"\x1f\x9d", Foreign("compressed with compress", "decompress it with `uncompress`")),
    (0, b"LZIP", Foreign("compressed with lzip", "decompress it with `lzip -d`")),
    (0, b"<!DOCTYPE", Foreign("an HTML page", "download the file itself; perhaps a login stands before it")),
    (0, b"<html", Foreign("an HTML page", "download the file itself; perhaps a login stands before it")),
    (0, b"<?xml", Foreign("an XML document", _EXPORT)),
    (0, b"version https://git-lfs", Foreign("a pointer of Git LFS", "fetch the file with `git lfs pull`")),
)
SIGNATURE_BYTES = 512


def foreign_kind(head: bytes) -> Foreign | None:
    """The kind of a file that is not read, by its first 512 bytes; None for one that may be JSON or CSV."""
    for offset, signature, kind in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return kind
    # A text with a stray zero byte is a text with a broken line; a tenth of them is none.
    if head.count(0) * 10 > len(head) and head.lstrip()[:1] not in (b"{", b"[") and text_encoding(head) is None:
        return Foreign("a binary file", _EXPORT)
    return None


def text_encoding(head: bytes) -> str | None:
    """The Python name of a text encoding other than UTF-8, by its mark or by the zero bytes of ASCII text in it."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    sample = head[:64]
    if len(sample) < 4:
        return None
    for name, width, places in _WIDE:
        units = [sample[start : start + width] for start in range(0, len(sample) - width + 1, width)]
        if all(all(unit[place] == 0 for place in places) and any(unit) for unit in units[:8]):
            return name
    return None


_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
# Encoding, bytes of a unit, and which of them are zero in ASCII text.
_WIDE = (
    ("utf-32-le", 4, (1, 2, 3)),
    ("utf-32-be", 4, (0, 1, 2)),
    ("utf-16-le", 2, (1,)),
    ("utf-16-be", 2, (0,)),
)
