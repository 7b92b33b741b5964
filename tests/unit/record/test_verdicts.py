"""Draft tokens: what is measured of them is added once it is known which were taken, and never else."""

from __future__ import annotations

import numpy as np
import torch

from reap_serve.record.accumulate import LayerSums, RowMeasures
from reap_serve.record.verdicts import Verdicts

TRASH = 4


def measures(*values: float) -> RowMeasures:
    """One expert a token, with these numbers for everything."""
    return RowMeasures(*(torch.tensor([[value] for value in values]) for _ in range(4)))


def sums_with(capacity: int) -> tuple[Verdicts, LayerSums]:
    verdicts = Verdicts(TRASH, capacity, torch.device("cpu"))
    return verdicts, LayerSums(TRASH, 2, torch.device("cpu"), verdicts)


def test_measures_wait_for_the_verdict_and_rejected_rows_leave_no_trace() -> None:
    verdicts, sums = sums_with(8)
    tickets = torch.from_numpy(verdicts.issue(np.array([1, 1, 3])))
    slot_T = torch.cat((torch.tensor([0]), tickets))
    sums.add(slot_T, torch.tensor([[0], [1], [1], [1]]), measures(1.0, 2.0, 40.0, 5.0))
    assert sums.tokens_S.sum() == 0
    # The recorder fills its buffer anew.
    slot_T.fill_(2)
    verdicts.tell(np.array([True, False, True]))
    sums.settle()
    sums.settle()
    assert sums.tokens_S.tolist() == [1, 1, 0, 1, 1]
    assert sums.sums_SEC[:TRASH, :, 2].tolist() == [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 5.0]]
    assert sums.maxima_SEC[:TRASH, :, 0].max() == 5.0


def test_tickets_that_were_copied_are_looked_up_steps_later_also_where_their_numbers_come_round() -> None:
    verdicts, sums = sums_with(4)
    for step in range(5):
        tickets = torch.from_numpy(verdicts.issue(np.array([step % TRASH, 2, 2])))
        verdicts.tell(np.array([True, False, step % 2 == 0]))
        sums.settle()
        # Measured after the step, as by a recorder that holds back.
        sums.add(tickets, torch.zeros(3, 1, dtype=torch.int64), measures(1.0, 1.0, 1.0))
    # Slots 0, 1, 2, 3, 0 for the first rows, slot 2 for the third in steps 0, 2 and 4; the rest is trash.
    assert sums.tokens_S.tolist() == [2, 1, 4, 1, 7]


def test_without_draft_tokens_slots_are_slots() -> None:
    verdicts, sums = sums_with(4)
    sums.add(torch.tensor([0, 3, TRASH]), torch.zeros(3, 1, dtype=torch.int64), measures(1.0, 1.0, 1.0))
    assert not verdicts.pending
    assert sums.tokens_S.tolist() == [1, 0, 0, 1, 1]
