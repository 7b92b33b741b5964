"""max-min against exhaustive search and cases worked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from statistics_of import random_statistics, statistics

from reap_serve.plan.decision import decide, gather
from reap_serve.plan.limits import ModelLimits
from reap_serve.plan.objective import MaxMin, _onto_simplex, retained_fractions
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.plan.summary import Summary, summarise


def test_the_rare_slice_gets_its_expert() -> None:
    # Slice a uses experts 0 and 1, slice b expert 3. By the mean over 100 times more tokens of a, 0 and 1 stay, and b
    # keeps 0.1 / 2.2; with 0 and 3 the worst slice keeps 2.0 / (2.0 + 1.9 + 0.1) = 0.5 of a.
    source = statistics(
        {
            "a": ([[1000, 1000, 1000, 1000]], [[2.0, 1.9, 0.1, 0.0]]),
            "b": ([[10, 10, 10, 10]], [[0.05, 0.05, 0.1, 2.0]]),
        },
        top_k=1,
    )
    model = ModelLimits("qwen3_moe", 4, 1)
    mean = decide(gather(source, PlanRequest(Size(keep_experts=2)), model), Size(keep_experts=2))
    assert np.flatnonzero(mean.kept_LE[0]).tolist() == [0, 1]
    evidence = gather(source, PlanRequest(Size(keep_experts=2), objective="max-min"), model)
    best = decide(evidence, Size(keep_experts=2))
    assert np.flatnonzero(best.kept_LE[0]).tolist() == [0, 3]
    assert best.max_min is not None
    assert best.max_min.worst_fraction == pytest.approx(0.5)


def one_layer(seed: int, num_slices: int, keep: int) -> tuple[MaxMin, float]:
    """What max-min finds for 8 experts in one layer, and the best of all choices."""
    size = Size(keep_experts=keep)
    source = random_statistics(num_slices, 1, 8, top_k=1, seed=seed)
    evidence = gather(source, PlanRequest(size, objective="max-min"), ModelLimits("qwen3_moe", 8, 1))
    result = decide(evidence, size).max_min
    assert result is not None
    best = max(
        evidence.share_SLE[:, 0, list(chosen)].sum(axis=1).min() for chosen in itertools.combinations(range(8), keep)
    )
    return result, float(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(2, 5))
def test_the_bound_holds_against_exhaustive_search(seed: int, num_slices: int, keep: int) -> None:
    result, best = one_layer(seed, num_slices, keep)
    assert result.worst_fraction - 1e-12 <= best <= result.bound_fraction + 1e-12


def test_one_layer_is_solved_but_for_a_percent() -> None:
    # A single layer is the hardest case, since what is left below the bound shrinks with the number of layers.
    found = [one_layer(seed, num_slices, 4) for seed in range(40) for num_slices in (2, 4)]
    assert np.mean([result.worst_fraction / best for result, best in found]) > 0.99


def test_many_layers_leave_next_to_nothing_below_the_bound() -> None:
    source = random_statistics(8, 24, 64, top_k=4)
    evidence = gather(source, PlanRequest(Size(0.5), objective="max-min"), ModelLimits("qwen3_moe", 64, 4))
    result = decide(evidence, Size(0.5)).max_min
    assert result is not None
    assert result.bound_fraction - result.worst_fraction < 0.003


def test_a_layer_counts_as_much_as_another_whatever_its_norms() -> None:
    share_SLE = np.array([[[0.75, 0.25], [0.5, 0.5]]])
    kept_LE = np.array([[True, False], [False, True]])
    assert retained_fractions(share_SLE, kept_LE).tolist() == [0.625]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_projection_onto_the_simplex_is_the_nearest_point(weights: list[float]) -> None:
    projected = _onto_simplex(np.array(weights))
    assert projected.min() >= 0
    assert projected.sum() == pytest.approx(1)
    # Variational inequality: (w - p) . (v - p) <= 0 for every vertex v.
    residual = np.array(weights) - projected
    assert all(residual @ (vertex - projected) <= 1e-9 for vertex in np.eye(len(weights)))


def test_summary_by_hand() -> None:
    # a: REAP 1 2 3 4 with 2 tokens each; b: 4 3 2 1 with 6 tokens each. Mixture: (2a + 6b) / 8 = 3.25 2.75 2.25 1.75.
    source = statistics({"a": ([[2] * 4], [[1, 2, 3, 4]]), "b": ([[6] * 4], [[4, 3, 2, 1]])}, top_k=1)
    evidence = gather(source, PlanRequest(Size(keep_experts=2)), ModelLimits("qwen3_moe", 4, 1))
    summary = summarise(evidence, decide(evidence, Size(keep_experts=2)), None)
    assert summary.retained_saliency.mixture == pytest.approx(6 / 10)
    assert summary.retained_saliency.slices == pytest.approx({"a": 3 / 10, "b": 7 / 10})
    assert summary.retained_saliency.worst_slice == "a"
    assert summary.retained_saliency.layers[0].slices == pytest.approx({"a": 0.3, "b": 0.7})
    # Equal counts: the sum of g|f| is the count times REAP, so its shares are the same.
    assert summary.retained_output == pytest.approx({"a": 0.3, "b": 0.7})
    # a alone keeps 2 and 3, b alone 0 and 1.
    assert summary.slice_overlap == ((1.0, 0.0), (0.0, 1.0))
    assert summary.keep_experts_per_layer == (2,)
    assert summary.bytes is None


def test_a_summary_with_an_overlap_that_is_none_is_refused() -> None:
    source = statistics({"a": ([[2] * 4], [[1, 2, 3, 4]])}, top_k=1)
    evidence = gather(source, PlanRequest(Size(keep_experts=2)), ModelLimits("qwen3_moe", 4, 1))
    fields = summarise(evidence, decide(evidence, Size(keep_experts=2)), None).model_dump()
    for overlap in (-1e300, 1.5, float("nan")):
        with pytest.raises(ValidationError, match="slice_overlap"):
            Summary.model_validate({**fields, "slice_overlap": ((overlap,),)})


def test_random_is_measured_by_reap() -> None:
    source = statistics({"a": ([[2] * 4], [[1, 2, 3, 4]])}, top_k=1)
    evidence = gather(source, PlanRequest(Size(keep_experts=2), "random"), ModelLimits("qwen3_moe", 4, 1))
    decision = decide(evidence, Size(keep_experts=2))
    retained = summarise(evidence, decision, None).retained_saliency
    assert retained.criterion == "reap"
    assert retained.mixture == pytest.approx((np.flatnonzero(decision.kept_LE[0]) + 1).sum() / 10)
