"""What a format of traffic is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.rows import Row


@dataclass(frozen=True, slots=True)
class Format:
    """A format of traffic files.

    Attributes:
        name: What `--format` calls it.
        has_text: Whether a record can hold the text of a request.
        recognises: Whether a record is of this format, judged by its keys.
        parse: The requests in a record, given where it stands and the slice of its file. Raises MalformedRecordError.
        specification: Public description of the format.
    """

    name: str
    has_text: bool
    recognises: Callable[[Row], bool]
    parse: Callable[[Row, Origin, str], Iterator[Request]]
    specification: str
