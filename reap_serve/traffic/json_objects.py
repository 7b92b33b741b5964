"""The objects of one large JSON document, found by their brackets, without holding the document.

A document is an array of objects, or a sequence of indented objects. Only brackets and strings are followed; what lies
between is parsed later, object by object, so that one broken object does not take the rest along. That is why this is
no streaming parser such as ijson: those stop at the first broken byte, and the line of the broken record is what a user
needs to hear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from reap_serve.traffic.malformed import MalformedRecordError

NOT_JSON = "not JSON"
NO_OBJECT = "not a JSON object"

_MARKS = re.compile(rb'[\\"{}\[\]\n]')
_BETWEEN_OBJECTS = b", \t\r\n\xef\xbb\xbf"
# Enough of what stands between two objects to know that it is not only commas and blanks.
_BETWEEN_BYTES = 1024


@dataclass(slots=True)
class ObjectScanner:
    """Cuts chunks of a document into its objects.

    Attributes:
        in_array: Whether the document is an array; else it is a sequence of objects.
        max_bytes: Length above which an object is passed over.
    """

    in_array: bool
    max_bytes: int
    _depth: int = 0
    _line: int = 1
    _object_line: int = 1
    _in_string: bool = False
    _escaped: bool = False
    _too_long: bool = False
    _array_closed: bool = False
    _object: bytearray = field(default_factory=bytearray)
    _between: bytearray = field(default_factory=bytearray)
    _between_line: int = 1

    @property
    def _outside(self) -> int:
        """Depth between objects."""
        return 1 if self.in_array else 0

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | MalformedRecordError]]:
        """The objects that end in a chunk.

        Yields:
            The line on which an object begins, from 1, and its bytes or what is wrong.
        """
        start = 0
        if self._escaped:
            # The byte after a backslash at the end of the chunk before.
            self._escaped, position = False, 1
            self._line += chunk[:1] == b"\n"
        else:
            position = 0
        while (match := _MARKS.search(chunk, position)) is not None:
            at, mark = match.start(), match.group()
            position = at + 1
            if mark == b"\n":
                self._line += 1
            elif self._in_string:
                if mark == b'"':
                    self._in_string = False
                elif mark == b"\\":
                    position += 1
                    self._escaped = position > len(chunk)
            elif mark == b'"':
                self._in_string = self._depth > self._outside
            elif mark in b"{[":
                if self._depth == self._outside:
                    self._between += chunk[start:at]
                    start, self._object_line = at, self._line
                elif self._depth < self._outside:
                    start, self._between_line = position, self._line
                self._depth += 1
            elif mark in b"}]" and self._depth > self._outside:
                self._depth -= 1
                if self._depth == self._outside:
                    self._keep(chunk[start:position])
                    yield from self._finish_object()
                    start = position
            elif mark == b"]" and self._depth == self._outside == 1:
                self._between += chunk[start:at]
                self._array_closed, start = True, position
        if self._depth > self._outside:
            self._keep(chunk[start:])
        else:
            self._between = (self._between + chunk[start:])[:_BETWEEN_BYTES]

    def close(self) -> Iterator[tuple[int, MalformedRecordError]]:
        """What is wrong with the end of the document, if anything."""
        if self._depth > self._outside:
            yield self._object_line, MalformedRecordError("file ends inside a JSON value")
        elif self._between.strip(_BETWEEN_OBJECTS):
            yield self._wrong_between()
        elif self.in_array and not self._array_closed:
            yield self._line, MalformedRecordError("file ends inside a JSON value")

    def _wrong_between(self) -> tuple[int, MalformedRecordError]:
        """The line on which something stands between two objects, and why it is no record."""
        before = len(self._between) - len(self._between.lstrip(_BETWEEN_OBJECTS))
        line = self._between_line + self._between.count(b"\n", 0, before)
        try:
            json.loads(b"[" + self._between.strip(_BETWEEN_OBJECTS) + b"]")
        except (ValueError, RecursionError):
            return line, MalformedRecordError(NOT_JSON)
        return line, MalformedRecordError(NO_OBJECT)

    def _keep(self, part: bytes) -> None:
        if self._too_long or len(self._object) + len(part) > self.max_bytes:
            self._too_long = True
            self._object.clear()
        else:
            self._object += part

    def _finish_object(self) -> Iterator[tuple[int, bytes | MalformedRecordError]]:
        if self._between.strip(_BETWEEN_OBJECTS):
            yield self._wrong_between()
        if self._too_long:
            reason = f"record longer than {self.max_bytes >> 20} MiB"
            yield self._object_line, MalformedRecordError(reason)
        else:
            yield self._object_line, bytes(self._object)
        self._between.clear()
        self._between_line = self._line
        self._object.clear()
        self._too_long = False
