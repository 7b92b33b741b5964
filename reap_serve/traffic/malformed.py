"""Lines that are no request: why, and how many."""

from __future__ import annotations

from dataclasses import dataclass, field


class MalformedRecordError(Exception):
    """A record that a reader cannot turn into a request.

    Args:
        reason: What is wrong, from a closed vocabulary: it is counted, and it quotes nothing of the record.
        detail: Where in the record, such as `messages[3]`; also without the record's text.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass(slots=True)
class Malformed:
    """Tally of the lines that `skip_malformed` passed over.

    Attributes:
        counts: Number of lines by reason.
        first: Place (`file:line`) of the first line of each reason.
        replaced: Number of halves of surrogate pairs that were replaced by U+FFFD, in lines that were not passed over.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    replaced: int = 0

    def add(self, reason: str, place: str) -> None:
        """Counts a line."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    @property
    def total(self) -> int:
        """Number of lines passed over."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason} (first {self.first[reason]})" for reason, count in self.counts.items())
