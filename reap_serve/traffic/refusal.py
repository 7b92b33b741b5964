"""Records that read well and that a chat template, a tokenizer or an engine refuses: each is that record's fault."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from reap_serve.errors import TrafficError
from reap_serve.records import JsonValue
from reap_serve.traffic.body import is_list
from reap_serve.traffic.malformed import Malformed
from reap_serve.traffic.request import Request

_LONGEST_REASON = 200
# So many characters that a reason shares with a request are no coincidence: it quotes it.
_QUOTED_CHARACTERS = 16
_SHORT_TEXT_CHARACTERS = 4
REASON = "refused by the engine"


class RefusedRecordError(Exception):
    """What renders or runs a request refuses it.

    Args:
        reason: Why, in the words of whatever refused it; they may quote the request, see `Refusals.refuse`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# Whatever templates, tokenizers and vLLM's checks stumble over in a record.
REFUSALS = (
    RefusedRecordError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
    RecursionError,
)


@dataclass(slots=True)
class Refusals:
    """What happens to a record that is refused.

    Attributes:
        skip: Pass over it and count it, instead of stopping.
        malformed: Where it is counted.
    """

    skip: bool = False
    malformed: Malformed = field(default_factory=Malformed)

    def refuse(self, request: Request, error: BaseException) -> None:
        """Counts a record that was refused.

        Raises:
            TrafficError: Records are not to be skipped.
        """
        reason = shown_reason(error, request)
        if not self.skip:
            raise TrafficError(
                f"{request.origin}: {REASON}: {reason}",
                "leave the record out, or skip such records with --skip-malformed",
            ) from None
        self.malformed.add(f"{REASON}: {reason}", str(request.origin))


def shown_reason(error: BaseException, request: Request) -> str:
    """The first line of an error, or its type alone where the line quotes the request."""
    reason = error.reason if isinstance(error, RefusedRecordError) else str(error)
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    name = type(error).__name__
    if not lines:
        return name
    # A pydantic error says the field on its second line, and then quotes the input.
    line = re.sub(r"[^\x20-\x7e]", "?", lines[0])[:_LONGEST_REASON]
    return name if _quotes(line, request) else line


def _quotes(line: str, request: Request) -> bool:
    windows = [line[start : start + _QUOTED_CHARACTERS] for start in range(len(line) - _QUOTED_CHARACTERS + 1)]
    for text in _texts([request.body, request.answer]):
        if len(text) < _QUOTED_CHARACTERS:
            if len(text) >= _SHORT_TEXT_CHARACTERS and re.search(rf"['\"]{re.escape(text)}['\"]", line):
                return True
        elif any(window in text for window in windows):
            return True
    return False


def _texts(value: JsonValue) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif is_list(value):
        for item in value:
            yield from _texts(item)
