"""Which row of a step belongs to which slice and phase, and which rows count at all.

A row counts once: not in a dummy or warm-up run, not as padding, and not again when a preempted request is computed
anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap_serve.statistics.record import PHASES

DEFAULT_SLICE = "default"
OVERFLOW_SLICE = "other"
SLICE_ARGUMENT = "reap_slice"
PROMPT_ARGUMENT = "reap_prompt_tokens"

Slots = npt.NDArray[np.int64]


@dataclass(slots=True)
class _DecodeStep:
    """A step of one new answer token a request, and what the next one looks like if nothing changes.

    Attributes:
        request_ids: Its requests, in order.
        num_scheduled: Rows of each: ones.
        by_request: The same, by request.
        next_positions: Position of each request's next row, `steps_on` steps ago.
        steps_on: Steps of the same kind that followed since then.
        slots: Slots of the rows.
        states: States of the requests; their counts are behind while such steps follow each other.
    """

    request_ids: list[str]
    num_scheduled: list[int]
    by_request: dict[str, int]
    next_positions: list[int]
    slots: Slots
    states: list[_RequestState]
    steps_on: int = 0

    def catch_up(self) -> None:
        """Advances the positions by the steps that followed."""
        if self.steps_on:
            self.next_positions = [position + self.steps_on for position in self.next_positions]
            self.steps_on = 0


@dataclass(slots=True)
class _RequestState:
    slice_index: int
    decode_from: int
    prompt_tokens: int
    counted: int = 0
    in_window: bool = False
    # From this position on, a row is an answer's token that was not counted yet.
    plain_from: int = 0


class StepRows:
    """Follows the requests of one engine and labels the rows of each step.

    A slot is `slice * len(PHASES) + phase`; `trash_slot` marks rows that do not count.

    Args:
        max_slices: Slices told apart, the overflow slice included.

    Attributes:
        requests: Requests with a token computed since the last reset.
        prompt_tokens_total: Prompt tokens of the requests since then, those found in the prefix cache included.
        prompt_tokens_computed: Of these, the computed ones.
    """

    def __init__(self, max_slices: int) -> None:
        self.max_slices = max_slices
        self.trash_slot = max_slices * len(PHASES)
        self.slices: list[str] = []
        self.requests = 0
        self.prompt_tokens_total = 0
        self.prompt_tokens_computed = 0
        self._requests: dict[str, _RequestState] = {}
        self._decode: _DecodeStep | None = None

    def add_request(self, request_id: str, prompt_tokens: int, arguments: dict[str, object] | None) -> None:
        """A request enters the engine.

        Args:
            request_id: The engine's id.
            prompt_tokens: Tokens of its prompt, a teacher-forced answer included.
            arguments: `SamplingParams.extra_args` (`vllm_xargs` of an HTTP request): `reap_slice` names the slice,
                `reap_prompt_tokens` is where a teacher-forced answer begins.
        """
        if request_id in self._requests:
            return
        arguments = arguments or {}
        name = arguments.get(SLICE_ARGUMENT)
        decode_from = arguments.get(PROMPT_ARGUMENT)
        self._requests[request_id] = _RequestState(
            slice_index=self._slice_index(name if isinstance(name, str) and name else DEFAULT_SLICE),
            decode_from=decode_from if isinstance(decode_from, int) else prompt_tokens,
            prompt_tokens=prompt_tokens,
        )
        self.prompt_tokens_total += prompt_tokens

    def finish_requests(self, request_ids: Iterable[str]) -> None:
        """Requests left the engine."""
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self.settle()

    def label(self, request_ids: Sequence[str], num_scheduled: Sequence[int], num_computed: Sequence[int]) -> Slots:
        """The slot of every row of a step, requests in the order of the batch; not to be written to.

        While the same requests decode on, every step gets the same array.

        Args:
            request_ids: Requests of the batch.
            num_scheduled: Rows of each in this step.
            num_computed: Tokens of each computed before this step: the position of its first row.
        """
        last = self._decode
        if last is not None and num_scheduled == last.num_scheduled and request_ids == last.request_ids:
            last.catch_up()
            if num_computed == last.next_positions:
                # Most steps of a server: the last one's requests, each a token on.
                last.steps_on = 1
                return last.slots
        self.settle()
        states = [self._requests.get(request_id) for request_id in request_ids]
        # Runs of equal slots, repeated once at the end.
        slots: list[int] = []
        lengths: list[int] = []
        decoding: list[_RequestState] = []
        for state, rows, first in zip(states, num_scheduled, num_computed, strict=True):
            if rows == 1 and state is not None and state.in_window and first >= state.plain_from:
                decoding.append(state)
                slots.append(state.slice_index * len(PHASES) + 1)
                lengths.append(1)
                state.counted = state.plain_from = first + 1
            else:
                self._label_request(state, int(first), int(first) + int(rows), slots, lengths)
        labels = np.repeat(np.array(slots, np.int64), np.array(lengths, np.int64))
        if len(decoding) == len(states):
            following = [int(first) + 1 for first in num_computed]
            ids, rows_each = list(request_ids), list(num_scheduled)
            by_request = dict(zip(ids, rows_each, strict=True))
            self._decode = _DecodeStep(ids, rows_each, by_request, following, labels, decoding)
        return labels

    def _label_request(
        self, state: _RequestState | None, start: int, end: int, slots: list[int], lengths: list[int]
    ) -> None:
        """Appends the runs of one request's rows, whose positions are start to end."""
        new = end if state is None else min(max(start, state.counted), end)
        if new > start:
            slots.append(self.trash_slot)
            lengths.append(new - start)
        if state is None or new == end:
            return
        self.requests += not state.in_window
        state.in_window = True
        state.counted = end
        state.plain_from = max(end, state.decode_from, state.prompt_tokens)
        slot = state.slice_index * len(PHASES)
        boundary = min(max(state.decode_from, new), end)
        if boundary > new:
            slots.append(slot)
            lengths.append(boundary - new)
        if end > boundary:
            slots.append(slot + 1)
            lengths.append(end - boundary)
        self.prompt_tokens_computed += max(min(state.prompt_tokens, end) - new, 0)

    @property
    def decoding(self) -> Mapping[str, int] | None:
        """Rows by request of the last labelled step, if each was an answer's token that was not counted before."""
        return None if self._decode is None else self._decode.by_request

    def pass_over(self, steps: int) -> None:
        """So many steps like the last labelled one ran, each of them a token on, and nobody asked for their labels."""
        assert self._decode is not None
        self._decode.steps_on += steps

    def settle(self) -> None:
        """Writes down how far the requests of the last decode steps have come; no step is like these any more."""
        last, self._decode = self._decode, None
        if last is not None:
            last.catch_up()
            for state, position in zip(last.states, last.next_positions, strict=True):
                state.counted = state.plain_from = position

    def reset(self) -> None:
        """Forgets what was counted; requests in flight are followed on."""
        self.settle()
        self.requests = 0
        for state in self._requests.values():
            state.in_window = False
        self.prompt_tokens_total = sum(max(state.prompt_tokens - state.counted, 0) for state in self._requests.values())
        self.prompt_tokens_computed = 0

    def _slice_index(self, name: str) -> int:
        if name in self.slices:
            return self.slices.index(name)
        if len(self.slices) >= self.max_slices - 1:
            name = OVERFLOW_SLICE
            if name in self.slices:
                return self.slices.index(name)
        self.slices.append(name)
        return len(self.slices) - 1
