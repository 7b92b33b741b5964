"""What a step of the engine is: one forward pass, its rows, and whose they are.

A row is one token's place in the batch of a step. A slot is `slice * len(PHASES) + phase`; the last slot is trash, for
rows that do not count.

Axes: R requests, T rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]
RowIndices = npt.NDArray[np.int64]


class NewRequest(NamedTuple):
    """A request that the engine sees for the first time.

    Attributes:
        id: The engine's id.
        prompt_tokens: Tokens of its prompt.
        arguments: Its extra arguments.
        stop_tokens: Tokens that end its answer.
        last_position: Of the tokens that enter the model; the one behind it is the last of the answer. None when the
            answer has no limit.
    """

    id: str
    prompt_tokens: int
    arguments: Mapping[str, object] | None
    stop_tokens: frozenset[int] = frozenset()
    last_position: int | None = None


class BatchRows(NamedTuple):
    """The requests of a step in the order of its rows.

    Attributes:
        request_ids: The requests.
        num_scheduled: Rows of each in this step.
        num_computed: Tokens of each computed before this step: the position of its first row.
        num_drafts: How many of its rows, the last ones, are draft tokens to be verified; empty when none are.
    """

    request_ids: Sequence[str]
    num_scheduled: Sequence[int]
    num_computed: Sequence[int]
    num_drafts: Sequence[int] = ()


class DraftRows(NamedTuple):
    """Draft tokens of one request that a step verifies.

    Attributes:
        request_id: The request.
        place: Of the request in the batch.
        first_row: Row of the first of them.
        num_rows: How many they are.
        position: Of the first of them in the request.
    """

    request_id: str
    place: int
    first_row: int
    num_rows: int
    position: int

    def taken(self, sampled: Sequence[int], stop_tokens: frozenset[int], last_position: int | None) -> int:
        """How many of them count: those that are taken, as far as the answer goes on after them.

        Args:
            sampled: Tokens that the request got, -1 for none: those that equal its draft tokens, and one more.
            stop_tokens: See `NewRequest`.
            last_position: See `NewRequest`.
        """
        accepted = min(sum(token >= 0 for token in sampled) - 1, self.num_rows)
        for number in range(accepted):
            beyond = last_position is not None and self.position + number > last_position
            if beyond or sampled[number] in stop_tokens:
                return number
        return max(0, accepted)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward pass with real tokens.

    Decode steps of the same requests that follow each other are one object: what was worked out for the first of them
    holds for all.

    Attributes:
        slot_T: Slot of each row.
        full_slot_T: The same with the rows of requests under a plan as trash: what statistics of the full model count.
        plan_rows: Rows of the requests under each plan, by the plan's id.
        drafts: Rows of which only sampling tells whether they count; they have slots as if they did.
    """

    slot_T: Slots
    full_slot_T: Slots
    plan_rows: Mapping[str, RowIndices]
    drafts: Sequence[DraftRows] = field(default=())

    @property
    def draft_rows(self) -> RowIndices:
        """The rows of all draft tokens."""
        parts = [np.arange(one.first_row, one.first_row + one.num_rows) for one in self.drafts]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def certain_slots(self, trash_slot: int) -> Slots:
        """The slots with draft tokens as trash: what may be counted before sampling."""
        if not self.drafts:
            return self.slot_T
        slot_T = self.slot_T.copy()
        slot_T[self.draft_rows] = trash_slot
        return slot_T


def step_under_plans(
    slot_T: Slots,
    plans: Sequence[str | None],
    plan_from_R: Sequence[int],
    batch: BatchRows,
    trash_slot: int,
    drafts: Sequence[DraftRows],
) -> Step:
    """The step of a batch in which requests are under plans.

    Args:
        slot_T: Slot of each row.
        plans: Id of the plan that each request is under, None for the full model.
        plan_from_R: Position of the first row of each request that its plan routes.
        batch: The requests in the order of the rows.
        trash_slot: Slot of rows that do not count.
        drafts: See `Step`.
    """
    names = sorted({plan for plan in plans if plan is not None})
    index_R = np.array([names.index(plan) if plan is not None else -1 for plan in plans], np.int64)
    index_T = np.repeat(index_R, np.asarray(batch.num_scheduled, np.int64))
    full_slot_T = np.where(index_T < 0, slot_T, trash_slot)
    if any(plan_from_R):
        # The slot does not tell: rows that are computed anew are trash, and under the plan as before.
        index_T[_positions(batch) < np.repeat(plan_from_R, batch.num_scheduled)] = -1
    rows_of: dict[str, RowIndices] = {name: np.flatnonzero(index_T == index) for index, name in enumerate(names)}
    plan_rows = {name: rows for name, rows in rows_of.items() if rows.shape[0] > 0}
    return Step(slot_T, full_slot_T, plan_rows, drafts)


def _positions(batch: BatchRows) -> RowIndices:
    """Position of each row in its request."""
    scheduled_R = np.asarray(batch.num_scheduled, np.int64)
    first_row_R = np.cumsum(scheduled_R) - scheduled_R
    offset_T: RowIndices = np.repeat(np.asarray(batch.num_computed, np.int64) - first_row_R, scheduled_R)
    return offset_T + np.arange(offset_T.shape[0])
