"""Plans end to end: choice, ties, merging, bytes of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from statistics_of import random_statistics, statistics

from reap_serve.errors import PlanError, RequestError
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.limits import ModelLimits
from reap_serve.plan.model_limits import limits_of_statistics
from reap_serve.plan.planner import format_plan, make_plan
from reap_serve.plan.record import Plan, read_plan
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.statistics.record import Statistics

ONE_LAYER = statistics({"a": ([[4, 10, 2, 6, 1, 9]], [[3.0, 1.0, 5.0, 3.0, 9.0, 0.0]])})


def plan_of(source: Statistics, request: PlanRequest, model: ModelLimits | None = None) -> Plan:
    evidence = gather(source, request, model or limits_of_statistics(source.header))
    return make_plan(source.header, evidence, decide(evidence, request.size))


@pytest.mark.parametrize(
    ("criterion", "kept"),
    [
        ("reap", (0, 2, 4)),  # 9, 5, and of the two threes the smaller index
        ("frequency", (1, 3, 5)),  # 10, 9, 6
        ("gate_sum", (1, 3, 5)),  # half of the counts
        ("weighted_ean_sum", (0, 1, 3)),  # 12 10 10 18 9 0: 18, 12, and of the two tens the smaller index
        ("ean_mean", (0, 2, 4)),  # twice reap
        ("ean_sum", (0, 1, 3)),  # twice weighted_ean_sum
        ("msan", (0, 2, 4)),  # square of twice reap
        ("asq", (2, 3, 4)),  # 4*9 10*1 2*25 6*9 1*81 0: 81, 54, 50
    ],
)
def test_the_highest_stay_and_ties_fall_to_the_smaller_index(criterion: str, kept: tuple[int, ...]) -> None:
    plan = plan_of(ONE_LAYER, PlanRequest(Size(keep_experts=3), criterion))
    assert plan.layers[0].kept == kept
    assert set(plan.layers[0].dropped) == set(range(6)) - set(kept)


def test_saliency_of_every_expert_is_in_the_plan() -> None:
    assert plan_of(ONE_LAYER, PlanRequest(Size(keep_experts=3))).layers[0].saliency == (3.0, 1.0, 5.0, 3.0, 9.0, 0.0)


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 3), (0.41, 2), (0.42, 3), (1.0, 6), (0.75, 5)])
def test_a_fraction_rounds_half_up(fraction: float, count: int) -> None:
    assert len(plan_of(ONE_LAYER, PlanRequest(Size(keep_fraction=fraction))).layers[0].kept) == count


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 8), (0.56, 8), (0.6, 12), (0.62, 12), (0.99, 16)])
def test_a_fraction_goes_to_the_nearest_count_that_groups_allow(fraction: float, count: int) -> None:
    # 4 groups of 4: 8, 12 and 16 are allowed; 0.56 * 16 rounds to 9 and so to 8, 0.6 * 16 to 10 and so to 12.
    source = random_statistics(1, 2, 16, top_k=1)
    plan = plan_of(source, PlanRequest(Size(keep_fraction=fraction)), ModelLimits("deepseek_v3", 16, 1, 4, 1))
    assert [len(layer.kept) for layer in plan.layers] == [count, count]


def test_groups_keep_equal_numbers_of_their_own_best() -> None:
    reap = [[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]]
    source = statistics({"a": ([[2] * 8], reap)}, top_k=2)
    plan = plan_of(source, PlanRequest(Size(keep_experts=4)), ModelLimits("deepseek_v3", 8, 2, 2, 1))
    assert plan.layers[0].kept == (0, 1, 6, 7)


def test_a_mixture_reweighs_slices_without_new_traffic() -> None:
    # Both slices see 2 tokens an expert; REAP of the mixture is the token-weighted mean: 0.9 * a + 0.1 * b.
    source = statistics({"a": ([[2, 2, 2]], [[1.0, 2.0, 3.0]]), "b": ([[2, 2, 2]], [[30.0, 2.0, 1.0]])}, top_k=2)
    assert plan_of(source, PlanRequest(Size(keep_experts=2), mix={"a": 1.0})).layers[0].kept == (1, 2)
    mixed = plan_of(source, PlanRequest(Size(keep_experts=2), mix={"a": 0.9, "b": 0.1}))
    assert mixed.layers[0].saliency == pytest.approx((3.9, 2.0, 2.8))
    assert mixed.layers[0].kept == (0, 2)


def test_the_tokens_that_a_plan_rests_on_are_in_it() -> None:
    # 6 and 10 routed tokens, 2 experts each.
    source = statistics({"a": ([[2, 2, 2]], [[1.0] * 3]), "b": ([[2, 3, 5]], [[1.0] * 3])}, top_k=2)
    requests = sum(window.requests for window in source.header.windows)
    both = plan_of(source, PlanRequest(Size(keep_experts=2)))
    assert both.provenance["observed"] == {"requests": requests, "tokens": {"a": 3, "b": 5}}
    one = plan_of(source, PlanRequest(Size(keep_experts=2), mix={"b": 1.0}))
    assert one.provenance["observed"] == {"requests": requests, "tokens": {"b": 5}}


def test_equal_inputs_give_equal_bytes_but_for_the_time() -> None:
    source, request = random_statistics(2, 3, 16), PlanRequest(Size(keep_fraction=0.5), objective="max-min")
    first, second = plan_of(source, request), plan_of(source, request)
    created = first.provenance["created"]
    second = second.model_copy(update={"provenance": {**second.provenance, "created": created}})
    assert format_plan(first) == format_plan(second)


def test_a_written_plan_reads_back(tmp_path: Path) -> None:
    plan = plan_of(random_statistics(2, 3, 16), PlanRequest(Size(keep_fraction=0.5)))
    (tmp_path / "plan.json").write_bytes(format_plan(plan))
    assert read_plan(tmp_path / "plan.json") == plan


def test_random_is_seeded() -> None:
    source = random_statistics(1, 2, 32)
    plans = [plan_of(source, PlanRequest(Size(keep_experts=16), "random", seed)).layers for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_group_limited_families_need_the_model() -> None:
    source = statistics({"a": ([[2, 2]], [[1.0, 2.0]])}, architecture="deepseek_v3")
    with pytest.raises(PlanError, match="add --model MODEL"):
        limits_of_statistics(source.header)


def test_statistics_of_one_pipeline_rank_are_refused() -> None:
    source = random_statistics(1, 4, 8)
    half = source.header.model_copy(update={"layers": source.header.layers[:2]})
    with pytest.raises(PlanError, match="cover 2 of 4 layers"):
        limits_of_statistics(half)


def test_statistics_without_tokens_are_refused() -> None:
    source = statistics({"a": (np.zeros((1, 4)), np.zeros((1, 4)))})
    with pytest.raises(PlanError, match="hold no token"):
        plan_of(source, PlanRequest(Size(keep_experts=2)))


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: Size(), "none was given"),
        (lambda: Size(0.5, 3), "--keep-fraction, --keep-experts was given"),
        (lambda: Size(keep_fraction=0.0), "--keep-fraction is 0"),
        (lambda: Size(keep_fraction=1.01), "--keep-fraction is 1.01"),
        (lambda: Size(keep_fraction=float("nan")), "--keep-fraction is nan"),
        (lambda: Size(keep_experts=0), "--keep-experts is 0"),
        (lambda: Size(target_bytes=-1), "--target-bytes is -1"),
        (lambda: PlanRequest(Size(0.5), min_tokens=-1), "--min-tokens is -1"),
        (lambda: PlanRequest(Size(0.5), pad_to_max=True), "--pad-to-max without --budget global"),
        (lambda: plan_of(ONE_LAYER, PlanRequest(Size(0.1))), "keeps 1 of 6 .* at least 2"),
        (lambda: plan_of(ONE_LAYER, PlanRequest(Size(keep_experts=7))), "keeps 7 of 6"),
        (lambda: plan_of(ONE_LAYER, PlanRequest(Size(target_bytes=10**9))), "add --model MODEL"),
        (lambda: plan_of(ONE_LAYER, PlanRequest(Size(0.5), "raep")), "no criterion raep; use one of: reap"),
        (lambda: plan_of(ONE_LAYER, PlanRequest(Size(0.5), mix={"b": 1.0})), "no slice b; use one of: a"),
    ],
)
def test_wrong_requests_are_refused_with_a_remedy(request_of: object, message: str) -> None:
    assert callable(request_of)
    with pytest.raises(RequestError, match=message):
        request_of()
