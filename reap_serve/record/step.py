"""What a step of the engine is: one forward pass, its rows, and whose they are.

A row is one token's place in the batch of a step. A slot is `slice * len(PHASES) + phase`; the last slot is trash, for
rows that do not count.

Axes: R requests, T rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]
RowIndices = npt.NDArray[np.int64]


class NewRequest(NamedTuple):
    """A request that the engine sees for the first time: its id, the tokens of its prompt, its extra arguments."""

    id: str
    prompt_tokens: int
    arguments: Mapping[str, object] | None


class BatchRows(NamedTuple):
    """The requests of a step in the order of its rows.

    Attributes:
        request_ids: The requests.
        num_scheduled: Rows of each in this step.
        num_computed: Tokens of each computed before this step: the position of its first row.
    """

    request_ids: Sequence[str]
    num_scheduled: Sequence[int]
    num_computed: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward pass with real tokens.

    Decode steps of the same requests that follow each other are one object: what was worked out for the first of them
    holds for all.

    Attributes:
        slot_T: Slot of each row.
        full_slot_T: The same with the rows of requests under a plan as trash: what statistics of the full model count.
        plan_rows: Rows of the requests under each plan, by the plan's id.
    """

    slot_T: Slots
    full_slot_T: Slots
    plan_rows: Mapping[str, RowIndices]
