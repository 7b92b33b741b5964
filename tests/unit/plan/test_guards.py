"""Super experts and experts that were seen too little."""

from __future__ import annotations

import numpy as np
import pytest
from statistics_of import statistics

from reap_serve.errors import PlanError
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.guards import super_experts
from reap_serve.plan.limits import ModelLimits
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.statistics.record import Statistics


def kept(source: Statistics, request: PlanRequest, top_k: int = 1) -> list[list[int]]:
    model = ModelLimits("qwen3_moe", source.header.model.num_experts, top_k)
    decision = decide(gather(source, request, model), request.size)
    return [np.flatnonzero(row).tolist() for row in decision.kept_LE]


def test_super_experts_exceed_the_percentile_and_a_tenth_of_the_largest() -> None:
    # 4 layers of 200 experts with activation 1: the 99.5th percentile stands at 0.995 * 799 = 795.005 of 0..799, which
    # is 1, so that a tenth of the largest, 50, decides. Planted: 500 in layer 1, 60 in layer 0, and 300 in layer 3,
    # which is in the last quarter.
    activation_max_LE = np.ones((4, 200))
    activation_max_LE[1, 7] = 500.0
    activation_max_LE[0, 3] = 60.0
    activation_max_LE[3, 9] = 300.0
    assert np.argwhere(super_experts(activation_max_LE)).tolist() == [[0, 3], [1, 7]]
    activation_max_LE[0, 3] = 49.0
    assert np.argwhere(super_experts(activation_max_LE)).tolist() == [[1, 7]]


def test_the_percentile_decides_where_many_are_large() -> None:
    # 0.995 * 399 = 397.005: between the values 60 and 300, at 60 + 0.005 * 240 = 61.2, above a tenth of 500.
    activation_max_LE = np.ones((4, 100))
    activation_max_LE[0, 3], activation_max_LE[0, 4], activation_max_LE[1, 7] = 60.0, 300.0, 500.0
    assert np.argwhere(super_experts(activation_max_LE)).tolist() == [[0, 4], [1, 7]]


@pytest.mark.parametrize("criterion", ["reap", "frequency", "gate_sum", "ean_sum", "ean_mean", "msan", "random"])
def test_a_super_expert_stays_under_every_criterion(criterion: str) -> None:
    # The made-up statistics take REAP for the largest activation: expert 5 of layer 0 was hit once, hard.
    counts, reap = np.full((4, 8), 100), np.ones((4, 8))
    counts[0, 5], reap[0, 5] = 2, 1000.0
    source = statistics({"a": (counts, reap)}, top_k=1)
    # 32 values: the 99.5th percentile interpolates below the largest one.
    request = PlanRequest(Size(keep_experts=1), criterion, seed=1, preserve_super_experts=True)
    assert kept(source, request)[0] == [5]


def test_frequency_alone_would_drop_the_super_expert() -> None:
    counts, reap = np.full((4, 8), 100), np.ones((4, 8))
    counts[0, 5], reap[0, 5] = 2, 1000.0
    source = statistics({"a": (counts, reap)}, top_k=1)
    assert kept(source, PlanRequest(Size(keep_experts=1), "frequency"))[0] == [0]


FEW = statistics({"a": ([[1, 100, 100, 0, 100]], [[9.0, 1.0, 2.0, 0.0, 3.0]])}, top_k=1)


@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        (lambda size: PlanRequest(size), [0, 4]),  # one token with 9 beats a hundred with 2
        (lambda size: PlanRequest(size, min_tokens=2), [2, 4]),  # 0 and 3 are not judged, and dropped first
        (lambda size: PlanRequest(size, min_tokens=2, unseen="keep"), [0, 3]),
        (lambda size: PlanRequest(size, min_tokens=1, unseen="keep"), [0, 3]),  # only 3 is below one token
    ],
)
def test_experts_seen_too_little_are_not_judged(request_of: object, expected: list[int]) -> None:
    assert callable(request_of)
    assert kept(FEW, request_of(Size(keep_experts=2))) == [expected]


def test_unjudged_experts_fill_up_when_the_judged_are_too_few() -> None:
    assert kept(FEW, PlanRequest(Size(keep_experts=4), min_tokens=2)) == [[0, 1, 2, 4]]


def test_more_guarded_than_kept_is_refused_with_the_numbers() -> None:
    request = PlanRequest(Size(keep_experts=1), min_tokens=2, unseen="keep")
    with pytest.raises(PlanError, match=r"layer 0 has 2 experts to keep .* 2 below --min-tokens .* but keeps 1"):
        kept(FEW, request)


def test_a_global_budget_gives_a_layer_room_for_its_guarded_experts() -> None:
    source = statistics({"a": ([[100] * 4, [0, 0, 0, 100]], [[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 1.0]])}, top_k=1)
    request = PlanRequest(Size(keep_experts=2), budget="global", min_tokens=1, unseen="keep")
    assert [len(ids) for ids in kept(source, request)] == [1, 3]
