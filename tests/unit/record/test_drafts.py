"""Draft tokens of a step: which rows may be rejected, and what counts when sampling has told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reap_serve.record.requests import Requests
from reap_serve.record.sampling import RowSampler
from reap_serve.record.step import BatchRows, NewRequest
from reap_serve.record.verdicts import Verdicts

STOP = 9


def requests(last_position: int | None = None, plan: str | None = None) -> Requests:
    """One request of two prompt tokens, which are computed."""
    found = Requests(max_slices=2)
    found.enter(NewRequest("a", 2, None, frozenset({STOP}), last_position), plan)
    found.step(BatchRows(["a"], [2], [0]))
    return found


@pytest.mark.parametrize(
    ("sampled", "taken"),
    [
        ([5, -1, -1, -1], 0),
        ([5, 6, -1, -1], 1),
        ([5, 6, 7, 8], 3),
        # The token that ends the answer, and what was drafted behind it, never enter the model in plain decoding.
        ([5, STOP, 7, 8], 1),
        ([STOP, -1, -1, -1], 0),
        ([STOP, 6, 7, 8], 0),
        ([5, 6, 7, STOP], 3),
    ],
)
def test_drafts_count_until_one_is_rejected_or_the_answer_ends(sampled: list[int], taken: int) -> None:
    rows = requests()
    step = rows.step(BatchRows(["a"], [4], [2], [3]))
    assert step.slot_T.tolist() == [1, 1, 1, 1]
    assert step.draft_rows.tolist() == [1, 2, 3]
    assert step.certain_slots(rows.trash_slot).tolist() == [1] + [rows.trash_slot] * 3
    assert rows.judge(step, [sampled]).tolist() == [True] + [number < taken for number in range(3)]
    # The next step begins behind what was taken; none of its rows was counted before.
    assert rows.step(BatchRows(["a"], [1], [3 + taken])).slot_T.tolist() == [1]


def test_drafts_behind_the_longest_answer_do_not_count() -> None:
    rows = requests(last_position=3)
    step = rows.step(BatchRows(["a"], [4], [2], [3]))
    assert rows.judge(step, [[5, 6, 7, 8]]).tolist() == [True, True, False, False]


def test_requests_without_drafts_stand_beside_others() -> None:
    rows = requests()
    rows.enter(NewRequest("b", 3, {"reap_slice": "s"}), None)
    step = rows.step(BatchRows(["b", "a"], [3, 2], [0, 2], [0, 1]))
    assert step.slot_T.tolist() == [2, 2, 2, 1, 1]
    assert step.draft_rows.tolist() == [4]
    assert rows.judge(step, [[4, -1], [5, -1]]).tolist() == [True] * 4 + [False]
    # Without drafts a step is as ever.
    assert rows.step(BatchRows(["b", "a"], [1, 1], [3, 3])).drafts == ()


def test_accepted_rows_that_are_computed_anew_after_preemption_do_not_count_again() -> None:
    rows = requests()
    step = rows.step(BatchRows(["a"], [3], [2], [2]))
    rows.judge(step, [[5, 6, -1]])
    trash = rows.trash_slot
    # Positions 0 to 3 were counted, 4 was rejected and is computed for the first time.
    assert rows.step(BatchRows(["a"], [5], [0])).slot_T.tolist() == [trash] * 4 + [1]


def test_a_request_that_left_before_the_verdict_takes_nothing() -> None:
    rows = requests()
    step = rows.step(BatchRows(["a"], [3], [2], [2]))
    rows.finish(["a"])
    assert rows.judge(step, [[5, 6, 7]]).tolist() == [True, False, False]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12),
    st.sampled_from([1.0, 0.4]),
    st.integers(0, 3),
)
def test_counters_tell_of_what_was_taken(steps: list[tuple[int, int]], fraction: float, seed: int) -> None:
    verdicts = Verdicts(4, 64, torch.device("cpu"))
    sampler = RowSampler(fraction, 4, torch.device("cpu"), seed, verdicts)
    real = sampled = 0
    for drafts, accepted in steps:
        slots = np.zeros(1 + drafts, np.int64)
        sampler.begin(slots, np.arange(1, 1 + drafts))
        taken_T = np.arange(1 + drafts) <= accepted
        rows = [] if sampler.sampled_rows(1 + drafts) is None else sampler.sampled_rows(1 + drafts).rows.tolist()
        sampler.end()
        sampler.tell(taken_T)
        real += int(taken_T.sum())
        sampled += int(taken_T[rows].sum())
        assert not verdicts.pending
    assert (sampler.real_tokens, sampler.sampled_tokens) == (real, sampled)
