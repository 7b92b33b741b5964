"""Records of a traffic file: lines of JSON, elements of a JSON array, or rows of CSV, one at a time.

Memory is bounded by the longest record, which is limited: a file without line breaks must not fill the memory.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Generator, Mapping

from pydantic_core import from_json

from reap_serve.records import MAX_DEPTH, JsonValue, depth_of
from reap_serve.traffic.json_objects import NO_OBJECT, NOT_JSON, ObjectScanner
from reap_serve.traffic.malformed import MalformedRecordError

Row = Mapping[str, JsonValue]
NumberedRow = tuple[int, Row | MalformedRecordError]

MAX_RECORD_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
# Columns by which the first line is known for a CSV header, in lower case.
_CSV_COLUMNS = frozenset({"contexttokens", "request tokens", "input"})
NOT_UTF8 = "not UTF-8"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
_TOO_LONG = f"record longer than {MAX_RECORD_BYTES >> 20} MiB"


def read_rows(stream: io.BufferedReader) -> Generator[NumberedRow]:
    """The records of a stream, in order.

    The container is found by the first line: `[` opens a JSON array, a lone `{` opens an indented object, a known
    header opens CSV, and everything else is one JSON value a line. Blank lines are no records.

    Yields:
        The line on which a record begins, from 1, and the record or what is wrong with it.
    """
    head = stream.peek(_CHUNK_BYTES).removeprefix(_BOM).lstrip()
    first_line = head.split(b"\n", 1)[0].strip()
    if first_line.startswith(b"["):
        return _document_objects(stream, in_array=True)
    if first_line == b"{":
        return _document_objects(stream, in_array=False)
    if _is_csv_header(first_line):
        return _csv_rows(stream)
    return _json_lines(stream)


def _is_csv_header(line: bytes) -> bool:
    if line.startswith(b"{"):
        return False
    cells = {cell.strip().strip('"').lower() for cell in line.decode("utf-8", "replace").split(",")}
    return len(cells) > 1 and not cells.isdisjoint(_CSV_COLUMNS)


def _decode(text: bytes | bytearray) -> Row | MalformedRecordError:
    try:
        value = from_json(text, allow_inf_nan=False, cache_strings="keys")
    except (ValueError, RecursionError):
        # The parser's message is left out: it may quote the text.
        return _mended(text)
    if not isinstance(value, dict):
        return MalformedRecordError(NO_OBJECT)
    return value


def _mended(text: bytes | bytearray) -> Row | MalformedRecordError:
    """A record with halves of surrogate pairs, which are no characters, replaced; else why it is none."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        return MalformedRecordError(NOT_UTF8)
    if not _SURROGATE.search(text):
        return MalformedRecordError(NOT_JSON)
    try:
        value = json.loads(decoded, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return MalformedRecordError(NOT_JSON)
    # Deeper than any log is written, and than what walks the record by recursion can go.
    if not isinstance(value, dict) or depth_of(value) > MAX_DEPTH or not is_finite(value):
        return MalformedRecordError(NOT_JSON)
    mended = MendedRow()
    for key, item in value.items():
        mended[mended.text(key)] = mended.value(item)
    return mended


class MendedRow(dict[str, JsonValue]):
    """A record in which halves of surrogate pairs were replaced by U+FFFD.

    Attributes:
        replaced: How many.
    """

    replaced: int = 0

    def text(self, text: str) -> str:
        """A text without them."""
        found, count = _HALF.subn("\ufffd", text)
        self.replaced += count
        return found

    def value(self, value: JsonValue) -> JsonValue:
        """A JSON value without them."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {self.text(key): self.value(item) for key, item in value.items()}
        return value


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def is_finite(value: JsonValue) -> bool:
    """Whether a JSON value holds no infinity: the parsers read `1e999` as one, which no JSON can hold again."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, list) else True


def _json_lines(stream: io.BufferedReader) -> Generator[NumberedRow]:
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK_BYTES)
            yield number, MalformedRecordError(_TOO_LONG)
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.isspace():
            yield number, _decode(line)


def _document_objects(stream: io.BufferedReader, *, in_array: bool) -> Generator[NumberedRow]:
    scanner = ObjectScanner(in_array=in_array, max_bytes=MAX_RECORD_BYTES)
    while chunk := stream.read1(_CHUNK_BYTES):
        for number, found in scanner.feed(chunk):
            yield number, found if isinstance(found, MalformedRecordError) else _decode(found)
    yield from scanner.close()


def _csv_rows(stream: io.BufferedReader) -> Generator[NumberedRow]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    # Bytes that are not UTF-8 become lone surrogates, so that one bad row does not end the reading.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        rows = csv.DictReader(text)
        while True:
            try:
                # Reads the header first, so that the line number is that of the row.
                begin_line = rows.line_num + 1 if rows.fieldnames else 1
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield begin_line, MalformedRecordError("not CSV")
                continue
            if None in row or None in row.values():
                yield begin_line, MalformedRecordError("row with another number of columns than the header")
            elif not all(_is_utf8(value) for value in row.values()):
                yield begin_line, MalformedRecordError(NOT_UTF8)
            else:
                yield begin_line, row
    finally:
        text.detach()


def _is_utf8(value: str) -> bool:
    return value.isascii() or not any("\udc80" <= character <= "\udcff" for character in value)
