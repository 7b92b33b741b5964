"""The split, the limits, the budget, and the masks that trials draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_of_known_costs import requests

from reap_serve.compare.record import Quality
from reap_serve.errors import RequestError
from reap_serve.tune.limits import judge, parse_limits
from reap_serve.tune.request import Budget, TuneRequest, parse_budget
from reap_serve.tune.split import split_traffic
from reap_serve.tune.trials import draw_mask


def quality_of(ratio: float, interval: tuple[float, float], **more: float) -> Quality:
    plain = dict.fromkeys(name for name, field in Quality.model_fields.items() if field.is_required())
    values = dict.fromkeys(plain, 1.0) | {"requests": 9, "tokens": 9, "perplexity_ratio": ratio}
    return Quality.model_validate({**values, "intervals": {"perplexity_ratio": interval}, **more})


def test_parts_hold_everything_once_and_share_no_conversation() -> None:
    some = requests(30)
    # A second turn of the first conversation: its first messages are the same.
    first = some[0]
    assert first.body is not None
    messages = first.body["messages"]
    assert isinstance(messages, list)
    later = replace(first, body={"messages": [*messages, {"role": "assistant"}, {"role": "user", "content": "more"}]})
    split = split_traffic((*some, later), seed=0)
    assert sum(len(part) for part in split.parts.values()) == 61
    holding = [part for part, members in split.parts.items() if first in members]
    assert [part for part, members in split.parts.items() if later in members] == holding
    assert split.conversations == {"statistics": 30, "selection": 12, "held-out": 18}


def test_a_seed_gives_the_same_parts_in_any_order_and_another_one_others() -> None:
    some = requests(30)
    one, other = split_traffic(some, 0), split_traffic(some[::-1], 0)
    for part in one.parts:
        assert {id(entry) for entry in one.parts[part]} == {id(entry) for entry in other.parts[part]}
    assert one.parts["held-out"] != split_traffic(some, 1).parts["held-out"]


def test_a_session_is_a_conversation() -> None:
    some = tuple(replace(entry, session=f"s{index // 10}") for index, entry in enumerate(requests(40, ("a",))))
    split = split_traffic(some, 0)
    sessions = [{entry.session for entry in part} for part in split.parts.values()]
    assert sum(map(len, sessions)) == 4


def test_a_slice_of_two_conversations_is_refused() -> None:
    with pytest.raises(RequestError, match="slice b has too few conversations"):
        split_traffic((*requests(9, ("a",)), *requests(2, ("b",))), 0)


def test_a_limit_is_judged_by_the_end_that_hurts_in_the_worst_slice() -> None:
    slices = {"a": quality_of(1.01, (1.0, 1.04)), "b": quality_of(1.02, (0.99, 1.06))}
    (below, above) = judge(
        parse_limits(["slices.*.quality.perplexity_ratio<1.05", "slices.a.quality.perplexity_ratio>0.99"], slices),
        slices,
    )
    assert (below.value, below.held, below.slice) == (1.06, False, "b")
    assert (above.value, above.held, above.slice) == (1.0, True, "a")


def test_a_count_is_judged_as_it_is_and_slices_without_it_are_passed_over() -> None:
    slices = {"a": quality_of(1.0, (1.0, 1.0)), "b": quality_of(1.0, (1.0, 1.0), tool_calls_lost=1)}
    (lost,) = judge(parse_limits(["slices.*.quality.tool_calls_lost<=0"], slices), slices)
    assert (lost.value, lost.held, lost.slice) == (1.0, False, "b")
    (unknown,) = judge(parse_limits(["slices.a.quality.tool_calls_lost<=0"], slices), slices)
    assert (unknown.value, unknown.held) == (None, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices.*.quality.perplexity<1", "no perplexity"),
        ("slices.c.quality.perplexity_ratio<1", "names no slice"),
        ("memory.candidate.weights_bytes<5", "names no quality of a slice"),
        ("tasks.*.recovery_percent>95", "names no quality of a slice"),
        ("perplexity below one", "is not PATH>NUMBER"),
    ],
)
def test_a_wrong_limit_is_refused_by_the_name_of_its_option(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"--limit .*{message}"):
        parse_limits([text], {"a", "b"})


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("30m", Budget(seconds=1800)),
        ("1.5h", Budget(seconds=5400)),
        ("90s", Budget(seconds=90)),
        ("200ktokens", Budget(masked_tokens=200_000)),
        ("none", Budget()),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "30", "m", "-5m", "0s", "1d", "none!"])
def test_a_wrong_budget_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is no budget"):
        parse_budget(text)


def test_without_limit_and_size_nothing_is_asked() -> None:
    with pytest.raises(RequestError, match="neither a limit nor a size"):
        TuneRequest("m", (), Path("out"))


def test_masks_keep_the_count_the_groups_and_what_is_far_above_the_cut() -> None:
    rng = np.random.default_rng(0)
    score_LE = np.tile(np.arange(16, 0, -1.0), (3, 1))
    masks = [draw_mask(score_LE, np.zeros((3, 16), np.int64), 2, 8, 2.0, rng) for _ in range(400)]
    kept_MLE = np.stack([mask.kept_LE for mask in masks])
    assert (kept_MLE.sum(axis=2) == 8).all()
    assert (kept_MLE.reshape(400, 3, 2, 8).sum(axis=3) == 4).all()
    # Each group of 8 keeps 4: ranks go 0, 2, 4 ... in the first, so that its first two are 4 ranks above the cut.
    assert kept_MLE[:, :, [0, 1, 8, 9]].all()
    assert not kept_MLE[:, :, [7, 15]].any()
    assert 0.3 < kept_MLE[:, :, 3].mean() < 0.9
    assert len({mask.id for mask in masks}) > 20


def test_guarded_experts_stay_in_every_mask() -> None:
    rng = np.random.default_rng(0)
    precedence_LE = np.zeros((1, 8), np.int64)
    precedence_LE[0, 7] = 1
    masks = [draw_mask(np.arange(8, 0, -1.0)[None], precedence_LE, 1, 3, 8.0, rng) for _ in range(50)]
    assert all(mask.kept_LE[0, 7] for mask in masks)
