"""The requests of an engine, and the step that each batch of their rows is.

A row counts once: not in a dummy or warm-up run, not as padding, and not again when a preempted request is computed
anew. A draft token counts if it is taken and the request goes on after it: what ends an answer does not enter the model
where tokens come one by one.

Axes: R requests, T rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from reap_serve.record.request import DecodeSteps, RequestState
from reap_serve.record.step import BatchRows, DraftRows, NewRequest, Slots, Step, step_under_plans
from reap_serve.slice_name import is_slice_name
from reap_serve.statistics.record import PHASES

DEFAULT_SLICE = "default"
OVERFLOW_SLICE = "other"
# What may put a request into that slice, by the names of the settings.
COUNT_LIMIT, ALLOWED_LIMIT = LIMITS = ("max_slices", "slices")
SLICE_ARGUMENT = "reap_slice"
PROMPT_ARGUMENT = "reap_prompt_tokens"
# Of a request that is no traffic.
UNCOUNTED_ARGUMENT = "reap_uncounted"


class Requests:
    """Follows the requests of one engine and makes a step of each batch: the one place where rows get their slots.

    Args:
        max_slices: Slices told apart, those of requests that name none and of all others included.
        allowed: The names that requests may bring, besides `default`; empty allows all while there are slots.

    Attributes:
        trash_slot: Slot of rows that do not count.
        beyond_limits: Requests that were put into the slice `other`, by the limit that did it.
        slices: Names of the slices seen so far, in the order of their slots.
        under_plan: Requests in the engine that are under a plan.
        requests: Requests of the full model with a token counted since the last reset.
        prompt_tokens_total: Prompt tokens of such requests since then, those found in the prefix cache included.
        prompt_tokens_computed: Of these, the computed ones.
    """

    def __init__(self, max_slices: int, allowed: Collection[str] = ()) -> None:
        self.max_slices = max_slices
        self.allowed = frozenset(allowed)
        self.beyond_limits = dict.fromkeys(LIMITS, 0)
        self.trash_slot = max_slices * len(PHASES)
        self.slices: list[str] = []
        self.under_plan = 0
        self.requests = 0
        self.prompt_tokens_total = 0
        self.prompt_tokens_computed = 0
        self._requests: dict[str, RequestState] = {}
        self._decode: DecodeSteps | None = None

    def add(
        self,
        request_id: str,
        prompt_tokens: int,
        arguments: Mapping[str, object] | None,
        plan: str | None = None,
        *,
        answer_only: bool = False,
    ) -> None:
        """A request enters the engine; see `enter`."""
        self.enter(NewRequest(request_id, prompt_tokens, arguments), plan, answer_only=answer_only)

    def enter(self, new: NewRequest, plan: str | None, *, answer_only: bool = False) -> None:
        """A request enters the engine.

        Args:
            new: The request. Of its arguments (`vllm_xargs` of an HTTP request), `reap_slice` names the slice,
                `reap_prompt_tokens` is where a teacher-forced answer begins, and `reap_uncounted` leaves it out.
            plan: Id of the plan that it is under, None for the full model.
            answer_only: Whether the plan routes the answer's rows alone; the full model reads the prompt.
        """
        arguments = new.arguments or {}
        if new.id in self._requests or arguments.get(UNCOUNTED_ARGUMENT):
            return
        name = arguments.get(SLICE_ARGUMENT)
        argument = arguments.get(PROMPT_ARGUMENT)
        decode_from = argument if isinstance(argument, int) else new.prompt_tokens
        self._requests[new.id] = RequestState(
            slice_index=self._slice_index(name if is_slice_name(name) else DEFAULT_SLICE),
            decode_from=decode_from,
            prompt_tokens=new.prompt_tokens,
            plan=plan,
            plan_from=decode_from if answer_only else 0,
            stop_tokens=new.stop_tokens,
            last_position=new.last_position,
        )
        if plan is None:
            self.prompt_tokens_total += new.prompt_tokens
        else:
            self.under_plan += 1

    def finish(self, request_ids: Iterable[str]) -> None:
        """Requests left the engine."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self.under_plan -= request.plan is not None
                self.settle()

    def step(self, batch: BatchRows, recorded: bool = True) -> Step:
        """The step of a batch whose forward pass follows; the same object while the same requests decode on.

        Args:
            batch: The requests in the order of the rows.
            recorded: Whether the window counts the step's requests and prompt tokens.
        """
        if self._decode is not None and self._decode.goes_on(batch, recorded):
            return self._decode.step
        self.settle()
        requests = [self._requests.get(request_id) for request_id in batch.request_ids]
        # Runs of equal slots, repeated once at the end.
        slots: list[int] = []
        lengths: list[int] = []
        decoding: list[RequestState] = []
        for request, rows, first in zip(requests, batch.num_scheduled, batch.num_computed, strict=True):
            if rows == 1 and request is not None and first >= request.plain_from > 0:
                if recorded:
                    self._count_request(request)
                decoding.append(request)
                slots.append(request.slice_index * len(PHASES) + 1)
                lengths.append(1)
                request.counted = request.plain_from = first + 1
            else:
                self._label(request, int(first), int(first) + int(rows), slots, lengths, recorded)
        drafts = self._drafts(requests, batch) if batch.num_drafts else ()
        slot_T = np.repeat(np.array(slots, np.int64), np.array(lengths, np.int64))
        step = self._step_of(slot_T, requests, batch, drafts)
        if len(decoding) == len(requests):
            following = [int(first) + 1 for first in batch.num_computed]
            self._decode = DecodeSteps(
                list(batch.request_ids), list(batch.num_scheduled), following, decoding, recorded, step
            )
        return step

    def _step_of(
        self, slot_T: Slots, requests: Sequence[RequestState | None], batch: BatchRows, drafts: Sequence[DraftRows]
    ) -> Step:
        if not self.under_plan:
            return Step(slot_T, slot_T, {}, drafts)
        plans = [None if request is None else request.plan for request in requests]
        starts = [0 if request is None else request.plan_from for request in requests]
        return step_under_plans(slot_T, plans, starts, batch, self.trash_slot, drafts)

    def _label(
        self, request: RequestState | None, start: int, end: int, slots: list[int], lengths: list[int], recorded: bool
    ) -> None:
        """Appends the runs of one request's rows, whose positions are start to end."""
        new = end if request is None else min(max(start, request.counted), end)
        if new > start:
            slots.append(self.trash_slot)
            lengths.append(new - start)
        if request is None or new == end:
            return
        request.counted = end
        request.plain_from = max(end, request.decode_from, request.prompt_tokens)
        slot = request.slice_index * len(PHASES)
        boundary = min(max(request.decode_from, new), end)
        if boundary > new:
            slots.append(slot)
            lengths.append(boundary - new)
        if end > boundary:
            slots.append(slot + 1)
            lengths.append(end - boundary)
        if recorded and request.plan is None:
            self._count_request(request)
            self.prompt_tokens_computed += max(min(request.prompt_tokens, end) - new, 0)

    def _drafts(self, requests: Sequence[RequestState | None], batch: BatchRows) -> Sequence[DraftRows]:
        """The draft tokens of a step whose rows were labelled; their requests' counts are taken back to before them."""
        found: list[DraftRows] = []
        row = 0
        for place, (request, rows, drafts) in enumerate(
            zip(requests, batch.num_scheduled, batch.num_drafts, strict=True)
        ):
            row += rows
            if drafts and request is not None:
                position = int(batch.num_computed[place]) + int(rows) - drafts
                request.counted = min(request.counted, position)
                request.plain_from = max(request.counted, request.decode_from, request.prompt_tokens)
                found.append(DraftRows(batch.request_ids[place], place, row - drafts, drafts, position))
        return found

    def judge(self, step: Step, sampled: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
        """Sampling has told which draft tokens of the step are taken.

        Args:
            step: The step.
            sampled: Tokens that each request of the batch got, -1 for none: those that equal its draft tokens, and one
                more.

        Returns:
            Whether each row of the step counts, as far as its draft tokens go.
        """
        taken_T = np.ones(step.slot_T.shape[0], np.bool_)
        for drafts in step.drafts:
            request = self._requests.get(drafts.request_id)
            taken = 0
            if request is not None:
                taken = drafts.taken(sampled[drafts.place], request.stop_tokens, request.last_position)
                request.counted = max(request.counted, drafts.position + taken)
                request.plain_from = max(request.plain_from, request.counted)
            taken_T[drafts.first_row + taken : drafts.first_row + drafts.num_rows] = False
        return taken_T

    def _count_request(self, request: RequestState) -> None:
        if request.plan is None:
            self.requests += not request.in_window
            request.in_window = True

    def settle(self) -> None:
        """Writes down how far the requests of the last decode steps have come; no step is like these any more."""
        last, self._decode = self._decode, None
        if last is not None:
            last.settle()

    def reset(self) -> None:
        """A new window begins: forgets what was counted; requests in the engine are followed on."""
        self.settle()
        self.requests = 0
        full = [request for request in self._requests.values() if request.plan is None]
        for request in full:
            request.in_window = False
        self.prompt_tokens_total = sum(max(request.prompt_tokens - request.counted, 0) for request in full)
        self.prompt_tokens_computed = 0

    def forget_slices(self) -> None:
        """Frees the slots of slices that no request in the engine has: for sums that begin again at zero."""
        self.settle()
        used = {request.slice_index for request in self._requests.values()}
        position = {old: new for new, old in enumerate(sorted(used))}
        self.slices = [self.slices[old] for old in position]
        for request in self._requests.values():
            request.slice_index = position[request.slice_index]
        self.beyond_limits = dict.fromkeys(LIMITS, 0)

    def plans(self) -> set[str]:
        """Ids of the plans that requests in the engine are under."""
        return {request.plan for request in self._requests.values() if request.plan is not None}

    def _slice_index(self, name: str) -> int:
        if name in self.slices:
            return self.slices.index(name)
        if (limit := self._limit_on(name)) is not None:
            self.beyond_limits[limit] += 1
            name = OVERFLOW_SLICE
            if name in self.slices:
                return self.slices.index(name)
        self.slices.append(name)
        return len(self.slices) - 1

    def _limit_on(self, name: str) -> str | None:
        """The limit that a new name exceeds; `other`, and `default` where the limit has room, always have a slot."""
        if name == OVERFLOW_SLICE or (name == DEFAULT_SLICE and self.max_slices > 1):
            return None
        if self.allowed and name not in self.allowed:
            return ALLOWED_LIMIT
        named = sum(known not in (OVERFLOW_SLICE, DEFAULT_SLICE) for known in self.slices)
        return COUNT_LIMIT if named >= self.max_slices - 2 else None
