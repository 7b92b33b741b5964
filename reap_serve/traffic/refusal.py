"""Records that read well and that a chat template, a tokenizer or an engine refuses: each is that record's fault."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from reap_serve.errors import TrafficError
from reap_serve.traffic.malformed import Malformed
from reap_serve.traffic.placeholders import texts_of
from reap_serve.traffic.request import Request

_LONGEST_REASON = 200
# So many characters that a reason shares with a request are no coincidence: it quotes it.
_QUOTED_CHARACTERS = 16
_SHORT_TEXT_CHARACTERS = 4
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?")
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
        # Without its numbers a reason is counted once for all records that it is the reason of.
        self.malformed.add(f"{REASON}: {_NUMBER.sub('N', reason)}", str(request.origin))


def shown_reason(error: BaseException, request: Request) -> str:
    """The first line of an error; where the line quotes the request, the error's type alone."""
    reason = error.reason if isinstance(error, RefusedRecordError) else str(error)
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    name = type(error.__cause__ or error).__name__
    if not lines:
        return name
    line = re.sub(r"[^\x20-\x7e]", "?", lines[0])[:_LONGEST_REASON]
    return f"{name}, whose text quotes the request" if _quotes(line, request) else line


def _quotes(line: str, request: Request) -> bool:
    excerpts = [line[start : start + _QUOTED_CHARACTERS] for start in range(len(line) - _QUOTED_CHARACTERS + 1)]
    for text, _ in texts_of(request.body or {}, request.answer):
        if len(text) < _QUOTED_CHARACTERS:
            if len(text) >= _SHORT_TEXT_CHARACTERS and re.search(rf"['\"]{re.escape(text)}['\"]", line):
                return True
        elif any(excerpt in text for excerpt in excerpts):
            return True
    return False
