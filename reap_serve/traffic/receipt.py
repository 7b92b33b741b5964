"""The receipt for traffic: what a log says was asked and answered, and what of it reached the model.

A conversation cut to its first turn, JSON taken for a prompt, thinking that a template leaves out: each reads well, and
each shows in the tokens. Where the log's own usage counts state how many there were, they are held against the tokens
that were rendered, record by record.

    difference = sum over the records of |rendered - recorded|
    deviation  = difference / sum of recorded
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import Field

from reap_serve.records import JsonValue, Record
from reap_serve.traffic.body import is_list
from reap_serve.traffic.request import Request

# A deviation above which a user is warned: what another version of a template adds, and no turn, stays below.
WARNED_DEVIATION = 0.03
# The same where tokens are estimated from characters, which is right within a factor of two.
WARNED_ESTIMATE = 1.0
# What templates write around a prompt, around each turn and around each call, in tokens, and what part of its length
# another tokenizer of the same family may differ by.
_PROMPT_TOKENS, _TURN_TOKENS, _CALL_TOKENS, _FRACTION = 16, 8, 8, 0.05
# Records that differ are counted, and so many of them named.
MAX_NAMED = 20


class SliceReceipt(Record):
    """The receipt of one slice of the traffic; numbers only.

    Token sums are over the records whose log states that count, so that the two of a pair are of the same records.

    Attributes:
        requests: Requests that were asked.
        reached: Of those, requests that were rendered and are not longer than the model takes.
        answers: Whole answers that were recorded.
        broken_answers: Answers that were begun and not recorded whole; they count as none.
        unread_answers: Further answers to the same prompt (`n`), which are not read.
        turns: Messages of the prompts and the answers; one for the prompt of a completion.
        tool_calls: Calls in them.
        tools: Definitions of tools beside the prompts.
        prompt_counts: Records that state their prompt's tokens.
        prompt_tokens_recorded: Those tokens.
        prompt_tokens_rendered: What the same prompts were rendered to.
        prompt_tokens_difference: Sum over the records of |rendered - recorded|.
        answer_counts: Records that state their answer's tokens.
        answer_tokens_recorded: Those tokens.
        answer_tokens_rendered: What the same answers were rendered to, with the token that ends each.
        answer_tokens_difference: As for the prompts; one token either way is the end of an answer.
        differing: Records of which prompt or answer differs by more than the template explains.
    """

    requests: int = Field(0, ge=0)
    reached: int = Field(0, ge=0)
    answers: int = Field(0, ge=0)
    broken_answers: int = Field(0, ge=0)
    unread_answers: int = Field(0, ge=0)
    turns: int = Field(0, ge=0)
    tool_calls: int = Field(0, ge=0)
    tools: int = Field(0, ge=0)
    prompt_counts: int = Field(0, ge=0)
    prompt_tokens_recorded: int = Field(0, ge=0)
    prompt_tokens_rendered: int = Field(0, ge=0)
    prompt_tokens_difference: int = Field(0, ge=0)
    answer_counts: int = Field(0, ge=0)
    answer_tokens_recorded: int = Field(0, ge=0)
    answer_tokens_rendered: int = Field(0, ge=0)
    answer_tokens_difference: int = Field(0, ge=0)
    differing: int = Field(0, ge=0)

    @property
    def prompt_deviation(self) -> float | None:
        """Deviation of the prompts; None when no count was recorded."""
        return _ratio(self.prompt_tokens_difference, self.prompt_tokens_recorded)

    @property
    def answer_deviation(self) -> float | None:
        """Deviation of the answers; None likewise."""
        return _ratio(self.answer_tokens_difference, self.answer_tokens_recorded)

    def __add__(self, other: SliceReceipt) -> SliceReceipt:
        """The receipt of both."""
        return SliceReceipt(**{name: getattr(self, name) + getattr(other, name) for name in SliceReceipt.model_fields})


class Difference(Record):
    """A record that differs by more than the template explains.

    Attributes:
        place: `file:line`.
        part: Which part of it.
        recorded: Tokens that the log states.
        rendered: Tokens that were rendered.
    """

    place: str
    part: str
    recorded: int
    rendered: int


class FileReceipt(Record):
    """The receipt of one file.

    Attributes:
        slices: By name, in the order of their first request.
        differences: Records that differ, the first 20.
    """

    slices: dict[str, SliceReceipt]
    differences: list[Difference]


class Receipt(Record):
    """The receipt of all files.

    Attributes:
        token_unit: What the rendered tokens are.
        estimated: Whether they are estimated from characters, so that only gross differences mean anything.
        files: By path.
    """

    token_unit: str
    estimated: bool
    files: dict[str, FileReceipt]

    def by_slice(self) -> dict[str, SliceReceipt]:
        """The receipts of the slices over all files."""
        found: dict[str, SliceReceipt] = {}
        for file in self.files.values():
            for name, receipt in file.slices.items():
                found[name] = found[name] + receipt if name in found else receipt
        return found

    def warnings(self) -> list[str]:
        """What deviates by more than the few percent that a template may, a line for each file, slice and part."""
        limit = WARNED_ESTIMATE if self.estimated else WARNED_DEVIATION
        found = []
        for path, file in self.files.items():
            for name, receipt in file.slices.items():
                for part, deviation, recorded, rendered in (
                    (
                        "prompt",
                        receipt.prompt_deviation,
                        receipt.prompt_tokens_recorded,
                        receipt.prompt_tokens_rendered,
                    ),
                    (
                        "answer",
                        receipt.answer_deviation,
                        receipt.answer_tokens_recorded,
                        receipt.answer_tokens_rendered,
                    ),
                ):
                    if deviation is not None and deviation > limit:
                        found.append(
                            f"{path}, slice {name}: the log states {recorded} {part} tokens and {rendered} were "
                            f"rendered, record by record {deviation:.1%} apart"
                        )
        return found


@dataclass(slots=True)
class _FileTally:
    slices: dict[str, dict[str, int]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


@dataclass(slots=True)
class ReceiptTally:
    """Accumulates requests into a receipt; memory does not grow with their number.

    Attributes:
        token_unit: What the rendered tokens are.
        estimated: Whether they are estimated from characters.
    """

    token_unit: str
    estimated: bool = False
    _files: dict[str, _FileTally] = field(default_factory=dict)

    def add(self, request: Request, prompt_tokens: int, answer_tokens: int, *, reached: bool = True) -> None:
        """Counts a request and what it was rendered to.

        Args:
            request: The request.
            prompt_tokens: Tokens of its prompt.
            answer_tokens: Tokens of its answer, with the one that ends it where there is one.
            reached: Whether the model takes it; a request of lengths only or a longer one does not reach it.
        """
        file = self._files.get(request.origin.source)
        if file is None:
            file = self._files[request.origin.source] = _FileTally()
        tally = file.slices.get(request.slice)
        if tally is None:
            tally = file.slices[request.slice] = dict.fromkeys(SliceReceipt.model_fields, 0)
        turns, calls = _turns(request)
        tally["requests"] += 1
        tally["answers"] += request.answer is not None
        tally["broken_answers"] += request.broken
        tally["unread_answers"] += max(request.choices - 1, 0)
        tally["turns"] += turns
        tally["tool_calls"] += calls
        tally["tools"] += _length(None if request.body is None else request.body.get("tools"))
        if request.body is None or not reached:
            return
        tally["reached"] += 1
        differs = self._compare(file, tally, request, "prompt", request.prompt_tokens, prompt_tokens, turns)
        if request.answer is not None:
            differs |= self._compare(file, tally, request, "answer", request.output_tokens, answer_tokens, calls)
        tally["differing"] += differs

    def _compare(
        self,
        file: _FileTally,
        tally: dict[str, int],
        request: Request,
        part: str,
        recorded: int | None,
        rendered: int,
        units: int,
    ) -> bool:
        if not recorded:
            return False
        difference = abs(rendered - recorded)
        if part == "answer" and difference == 1:
            difference = 0
        tally[f"{part}_counts"] += 1
        tally[f"{part}_tokens_recorded"] += recorded
        tally[f"{part}_tokens_rendered"] += rendered
        tally[f"{part}_tokens_difference"] += difference
        around = _PROMPT_TOKENS + _TURN_TOKENS * units if part == "prompt" else _CALL_TOKENS * (1 + units)
        least, most = (recorded / 2, recorded * 2) if self.estimated else (recorded, recorded)
        allowed = around + _FRACTION * recorded
        if least - allowed <= rendered <= most + allowed:
            return False
        if len(file.differences) < MAX_NAMED:
            file.differences.append(
                Difference(place=str(request.origin), part=part, recorded=recorded, rendered=rendered)
            )
        return True

    def receipt(self) -> Receipt:
        """The receipt of the requests so far."""
        return Receipt(
            token_unit=self.token_unit,
            estimated=self.estimated,
            files={
                path: FileReceipt(
                    slices={name: SliceReceipt(**tally) for name, tally in file.slices.items()},
                    differences=list(file.differences),
                )
                for path, file in self._files.items()
            },
        )


def _turns(request: Request) -> tuple[int, int]:
    """Messages of a request and its answer, and the tool calls in them."""
    if request.body is None:
        return 0, 0
    messages = request.body.get("messages")
    turns: list[JsonValue] = list(messages) if is_list(messages) else [request.body.get("prompt")]
    if request.answer is not None:
        turns.append(request.answer)
    return len(turns), sum(
        [_length(turn["tool_calls"]) for turn in turns if isinstance(turn, dict) and "tool_calls" in turn]
    )


def _length(value: JsonValue) -> int:
    return len(value) if is_list(value) else 0


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
