"""Rows of a step get the slot of their slice and phase, once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_serve.record.requests import Requests
from reap_serve.record.step import BatchRows


def slots(rows: Requests, request_ids: list[str], num_scheduled: list[int], num_computed: list[int]) -> list[int]:
    """The slot of each row of a step."""
    return rows.step(BatchRows(request_ids, num_scheduled, num_computed)).slot_T.tolist()


def test_prompt_rows_are_prefill_and_the_rest_decode() -> None:
    rows = Requests(max_slices=4)
    rows.add("a", 3, {"reap_slice": "code"})
    rows.add("b", 2, {"reap_slice": "prose"})
    assert slots(rows, ["a", "b"], [3, 2], [0, 0]) == [0, 0, 0, 2, 2]
    assert slots(rows, ["b", "a"], [1, 1], [2, 3]) == [3, 1]
    assert rows.slices == ["code", "prose"]
    assert (rows.requests, rows.prompt_tokens_total, rows.prompt_tokens_computed) == (2, 5, 5)


def test_a_teacher_forced_answer_is_decode_also_across_a_chunk() -> None:
    rows = Requests(max_slices=2)
    rows.add("a", 6, {"reap_prompt_tokens": 4})
    assert slots(rows, ["a"], [3], [0]) == [0, 0, 0]
    assert slots(rows, ["a"], [3], [3]) == [0, 1, 1]
    assert rows.prompt_tokens_computed == 6


def test_rows_that_are_computed_anew_after_preemption_do_not_count() -> None:
    rows = Requests(max_slices=2)
    rows.add("a", 2, None)
    assert slots(rows, ["a"], [2], [0]) == [0, 0]
    assert slots(rows, ["a"], [1], [2]) == [1]
    trash = rows.trash_slot
    # Preempted: three known tokens again, and one new one.
    assert slots(rows, ["a"], [4], [0]) == [trash, trash, trash, 1]
    assert rows.prompt_tokens_computed == 2


def test_prefix_cached_tokens_are_in_the_total_only() -> None:
    rows = Requests(max_slices=2)
    rows.add("a", 5, None)
    assert slots(rows, ["a"], [2], [3]) == [0, 0]
    assert (rows.prompt_tokens_total, rows.prompt_tokens_computed) == (5, 2)


def test_unknown_requests_are_trash() -> None:
    rows = Requests(max_slices=2)
    rows.add("a", 1, None)
    rows.finish(["a", "never seen"])
    assert slots(rows, ["a"], [2], [0]) == [rows.trash_slot] * 2


def test_slices_beyond_the_limit_share_one() -> None:
    rows = Requests(max_slices=4)
    for number, name in enumerate(("x", "y", "z", "w", "x", "default")):
        rows.add(str(number), 1, {"reap_slice": name})
    labels = slots(rows, ["0", "1", "2", "3", "4", "5"], [1] * 6, [0] * 6)
    assert rows.slices == ["x", "y", "other", "default"]
    assert labels == [0, 2, 4, 4, 0, 6]
    assert rows.trash_slot == 8
    assert rows.beyond_limits == {"max_slices": 2, "slices": 0}


@pytest.mark.parametrize(("max_slices", "names"), [(1, ["other"]), (2, ["other", "default"])])
def test_without_room_all_names_are_one_slice(max_slices: int, names: list[str]) -> None:
    rows = Requests(max_slices)
    rows.add("a", 1, {"reap_slice": "x"})
    rows.add("b", 1, None)
    assert rows.slices == names


def test_names_that_were_not_allowed_take_no_slot() -> None:
    rows = Requests(max_slices=4, allowed=("x", "y"))
    for number, name in enumerate(("one", "two", "three", "y", "x", "default")):
        rows.add(str(number), 1, {"reap_slice": name})
    assert rows.slices == ["other", "y", "x", "default"]
    assert rows.beyond_limits == {"max_slices": 0, "slices": 3}


def test_forgotten_slices_give_their_slots_up() -> None:
    rows = Requests(max_slices=4)
    for number, name in enumerate(("x", "y", "z")):
        rows.add(str(number), 1, {"reap_slice": name})
    rows.finish(["0"])
    # One that runs on keeps its slice, under another slot.
    assert slots(rows, ["1", "2"], [1, 1], [0, 0]) == [2, 4]
    rows.reset()
    rows.forget_slices()
    assert rows.slices == ["y", "other"]
    assert rows.beyond_limits == {"max_slices": 0, "slices": 0}
    assert slots(rows, ["1", "2"], [1, 1], [1, 1]) == [1, 3]
    rows.add("3", 1, {"reap_slice": "w"})
    assert rows.slices == ["y", "other", "w"]


@pytest.mark.parametrize("arguments", [None, {}, {"reap_slice": ""}, {"reap_slice": 3}])
def test_a_request_without_a_name_of_its_slice_is_default(arguments: dict[str, object] | None) -> None:
    rows = Requests(max_slices=2)
    rows.add("a", 1, arguments)
    assert rows.slices == ["default"]


def test_a_reset_forgets_what_was_counted_but_not_what_is_in_flight() -> None:
    rows = Requests(max_slices=2)
    rows.add("a", 4, None)
    rows.add("b", 2, None)
    slots(rows, ["a", "b"], [3, 2], [0, 0])
    rows.finish(["b"])
    rows.reset()
    assert (rows.requests, rows.prompt_tokens_total, rows.prompt_tokens_computed) == (0, 1, 0)
    assert slots(rows, ["a"], [1], [3]) == [0]
    assert (rows.requests, rows.prompt_tokens_computed) == (1, 1)


def test_a_finished_request_that_is_not_yet_announced_is_not_of_the_next_window() -> None:
    rows = Requests(max_slices=2)
    rows.add("a", 2, None)
    slots(rows, ["a"], [2], [0])
    rows.reset()
    assert (rows.requests, rows.prompt_tokens_total) == (0, 0)


EVENTS = ["step", "step", "step", "preempt a", "preempt b", "leave", "enter", "reset", "pause"]


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_runs_of_decode_steps_are_labelled_like_single_ones(events: list[str]) -> None:
    """Two requests decode; `single` never sees two steps alike, since a third request comes and goes between them."""
    running, single = Requests(max_slices=4), Requests(max_slices=4)
    position = {"a": 0, "b": 0}
    lengths = {"a": 3, "b": 2}

    def enter(name: str) -> None:
        for rows in (running, single):
            rows.add(name, lengths[name], {"reap_slice": name})
        position[name] = 0

    def leave(name: str) -> None:
        for rows in (running, single):
            rows.finish([name])
        position[name] = -1

    def step(names: list[str]) -> None:
        scheduled = [lengths[name] if position[name] == 0 else 1 for name in names]
        computed = [position[name] for name in names]
        slots(single, ["unknown"], [1], [0])
        expected = slots(single, names, scheduled, computed)
        assert slots(running, names, scheduled, computed) == expected
        for name, rows in zip(names, scheduled, strict=True):
            position[name] += rows

    enter("a")
    enter("b")
    for event in events:
        here = [name for name in ("a", "b") if position[name] >= 0]
        if event == "step" and here:
            step(here)
        elif event.startswith("preempt") and event[-1] in here:
            position[event[-1]] = 0
        elif event == "leave" and here:
            leave(here[-1])
        elif event == "enter":
            for name in {"a", "b"} - set(here):
                enter(name)
        elif event == "reset":
            running.reset()
            single.reset()
        elif event == "pause" and here:
            # Steps that nobody follows.
            running.settle()
            for name in here:
                position[name] += 2 if position[name] else 0
        counted = [(rows.requests, rows.prompt_tokens_total, rows.prompt_tokens_computed) for rows in (running, single)]
        assert counted[0] == counted[1]
    running.reset()
    single.reset()
    assert running.prompt_tokens_total == single.prompt_tokens_total


def test_rows_under_a_plan_are_no_rows_of_the_full_model() -> None:
    rows = Requests(max_slices=4)
    rows.add("a", 2, {"reap_slice": "code"})
    rows.add("b", 3, {"reap_slice": "code"}, plan="p")
    rows.add("c", 1, {"reap_slice": "prose"}, plan="q")
    step = rows.step(BatchRows(["b", "a", "c"], [2, 2, 1], [0, 0, 0]))
    assert step.slot_T.tolist() == [0, 0, 0, 0, 2]
    assert step.full_slot_T.tolist() == [8, 8, 0, 0, 8]
    assert {plan: found.tolist() for plan, found in step.plan_rows.items()} == {"p": [0, 1], "q": [4]}
    assert (rows.requests, rows.prompt_tokens_total, rows.prompt_tokens_computed, rows.under_plan) == (1, 2, 2, 2)
    rows.finish(["b", "c"])
    assert rows.under_plan == 0
    assert rows.step(BatchRows(["a"], [1], [2])).plan_rows == {}


def test_a_plan_may_route_the_answer_alone_also_when_it_is_computed_anew() -> None:
    rows = Requests(max_slices=4)
    rows.add("a", 3, None, plan="p", answer_only=True)
    rows.add("b", 6, {"reap_prompt_tokens": 4}, plan="p", answer_only=True)
    rows.add("c", 2, None, plan="q")
    step = rows.step(BatchRows(["a", "b", "c"], [3, 5, 2], [0, 0, 0]))
    # Of b, whose answer is teacher-forced, the fifth token is the answer's first.
    assert {plan: found.tolist() for plan, found in step.plan_rows.items()} == {"p": [7], "q": [8, 9]}
    # The prompts' rows are the full model's, and yet no part of its statistics.
    assert step.full_slot_T.tolist() == [rows.trash_slot] * 10
    step = rows.step(BatchRows(["b", "a"], [1, 1], [5, 3]))
    assert step.plan_rows["p"].tolist() == [0, 1]
    # Preempted: a is computed from its first token again.
    step = rows.step(BatchRows(["a"], [5], [0]))
    assert step.slot_T.tolist() == [rows.trash_slot] * 4 + [1]
    assert step.plan_rows["p"].tolist() == [3, 4]


def test_a_prompt_under_a_plan_for_answers_is_masked_nowhere() -> None:
    rows = Requests(max_slices=4)
    rows.add("a", 3, None, plan="p", answer_only=True)
    assert rows.step(BatchRows(["a"], [3], [0])).plan_rows == {}


def test_a_step_that_is_not_recorded_counts_nothing_of_its_window() -> None:
    rows = Requests(max_slices=4)
    rows.add("a", 2, None)
    assert rows.step(BatchRows(["a"], [2], [0]), recorded=False).slot_T.tolist() == [0, 0]
    assert (rows.requests, rows.prompt_tokens_computed) == (0, 0)
    for _ in range(2):
        rows.step(BatchRows(["a"], [1], [2]), recorded=False)
    assert rows.requests == 0
    rows.step(BatchRows(["a"], [1], [3]))
    assert rows.requests == 1


def test_decode_steps_of_the_same_requests_are_one_step() -> None:
    rows = Requests(max_slices=4)
    rows.add("a", 2, None)
    rows.step(BatchRows(["a"], [2], [0]))
    first = rows.step(BatchRows(["a"], [1], [2]))
    assert rows.step(BatchRows(["a"], [1], [3])) is first
    # Computed anew from its last token on.
    again = rows.step(BatchRows(["a"], [1], [3]))
    assert again.slot_T.tolist() == [rows.trash_slot]
