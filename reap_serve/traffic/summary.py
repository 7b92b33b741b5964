"""What is in traffic: requests, tokens by slice, formats, sessions, time."""

from __future__ import annotations

from dataclasses import dataclass, field

from reap_serve.records import Record
from reap_serve.traffic.malformed import Malformed
from reap_serve.traffic.receipt import Receipt, ReceiptTally
from reap_serve.traffic.request import Request
from reap_serve.traffic.tokens import TokenCounter

# Distinct sessions are counted up to here, so that memory does not grow with the traffic.
MAX_SESSIONS = 200_000


class SliceSummary(Record):
    """One slice of the traffic.

    Attributes:
        requests: Number of requests.
        answers: Number of those with a recorded answer.
        prompt_tokens: Sum over the prompts.
        output_tokens: Sum over the recorded answers.
    """

    requests: int
    answers: int
    prompt_tokens: int
    output_tokens: int


class TrafficSummary(Record):
    """What is in traffic.

    Attributes:
        requests: Number of requests.
        length_only: Number of those without text.
        token_unit: What the token counts are of; that of requests without text is the recorded length.
        formats: Number of requests by format.
        slices: By name, in the order of their first request.
        sessions: Number of distinct sessions.
        sessions_complete: Whether it is exact; else there are at least as many.
        duration_seconds: Last minus first timestamp; None when fewer than two requests have one.
        malformed: Number of skipped records by reason.
        replaced_surrogates: Number of halves of surrogate pairs that were replaced by U+FFFD.
        receipt: What the files say was asked and answered, against what it was rendered to.
    """

    requests: int
    length_only: int
    token_unit: str
    formats: dict[str, int]
    slices: dict[str, SliceSummary]
    sessions: int
    sessions_complete: bool
    duration_seconds: float | None
    malformed: dict[str, int]
    replaced_surrogates: int
    receipt: Receipt


@dataclass(slots=True)
class _SliceTally:
    requests: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class SummaryTally:
    """Accumulates requests into a summary; memory does not grow with their number.

    Attributes:
        counter: Measures the requests.
    """

    counter: TokenCounter
    _receipt: ReceiptTally = field(init=False)
    _formats: dict[str, int] = field(default_factory=dict)
    _slices: dict[str, _SliceTally] = field(default_factory=dict)
    _sessions: set[int] = field(default_factory=set)
    _length_only: int = 0
    _timestamps: int = 0
    _first: float = 0.0
    _last: float = 0.0

    def __post_init__(self) -> None:
        self._receipt = ReceiptTally(self.counter.unit, estimated=self.counter.estimated)

    def add(self, request: Request) -> None:
        """Counts a request.

        Raises:
            RefusedRecordError: The counter's chat template refuses it.
        """
        length = self.counter(request)
        self._receipt.add(request, length.prompt_tokens, length.output_tokens)
        tally = self._slices.setdefault(request.slice, _SliceTally())
        tally.requests += 1
        tally.answers += request.answer is not None
        tally.prompt_tokens += length.prompt_tokens
        tally.output_tokens += length.output_tokens
        self._formats[request.origin.format] = self._formats.get(request.origin.format, 0) + 1
        self._length_only += not request.has_text
        if request.session is not None and len(self._sessions) < MAX_SESSIONS:
            self._sessions.add(hash((request.origin.source, request.session)))
        if request.timestamp is not None:
            self._first = min(self._first, request.timestamp) if self._timestamps else request.timestamp
            self._last = max(self._last, request.timestamp) if self._timestamps else request.timestamp
            self._timestamps += 1

    def summary(self, malformed: Malformed) -> TrafficSummary:
        """The summary of the requests so far."""
        return TrafficSummary(
            requests=sum(tally.requests for tally in self._slices.values()),
            length_only=self._length_only,
            token_unit=self.counter.unit,
            formats=dict(self._formats),
            slices={
                name: SliceSummary(
                    requests=tally.requests,
                    answers=tally.answers,
                    prompt_tokens=tally.prompt_tokens,
                    output_tokens=tally.output_tokens,
                )
                for name, tally in self._slices.items()
            },
            sessions=len(self._sessions),
            sessions_complete=len(self._sessions) < MAX_SESSIONS,
            duration_seconds=self._last - self._first if self._timestamps > 1 else None,
            malformed=dict(malformed.counts),
            replaced_surrogates=malformed.replaced,
            receipt=self._receipt.receipt(),
        )
