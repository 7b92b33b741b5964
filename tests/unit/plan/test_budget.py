"""Counts by layer and by bytes, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from statistics_of import statistics

from reap_serve.errors import PlanError
from reap_serve.plan.decision import Decision, decide, gather
from reap_serve.plan.limits import ModelLimits, ServingTarget
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.plan.sizes import CheckpointBytes
from reap_serve.plan.summary import summarise
from reap_serve.plan.sweep import sweep

# Layer 0 is concentrated on expert 0, layer 1 is flat: shares 0.85 0.05 0.05 0.05 and 0.25 each.
TWO_LAYERS = statistics({"a": ([[4] * 4, [4] * 4], [[17.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])}, top_k=1)
CHECKPOINT = CheckpointBytes(1000, np.array([10, 30]), mtp_expert_bytes=5)


def decision(request: PlanRequest) -> Decision:
    return decide(gather(TWO_LAYERS, request, ModelLimits("qwen3_moe", 4, 1)), request.size, CHECKPOINT)


def counts(request: PlanRequest) -> list[int]:
    return decision(request).count_by_layer().tolist()


def test_a_global_budget_goes_where_the_shares_are() -> None:
    # 4 experts: one in each layer (floor top_k), then twice 0.25 of layer 1 before 0.05 of layer 0.
    assert counts(PlanRequest(Size(keep_experts=2), budget="global")) == [1, 3]
    assert counts(PlanRequest(Size(keep_fraction=0.75), budget="global")) == [2, 4]


def test_pad_to_max_makes_it_uniform_at_the_largest_count() -> None:
    assert counts(PlanRequest(Size(keep_experts=2), budget="global", pad_to_max=True)) == [3, 3]


def test_a_global_budget_keeps_to_multiples() -> None:
    request = PlanRequest(Size(keep_experts=3), budget="global", target=ServingTarget(multiple_of=2))
    assert counts(request) == [2, 4]


def test_counts_by_layer_are_marked_as_needing_the_patch() -> None:
    request = PlanRequest(Size(keep_experts=2), budget="global")
    evidence = gather(TWO_LAYERS, request, ModelLimits("qwen3_moe", 4, 1))
    summary = summarise(evidence, decide(evidence, request.size), None)
    assert summary.needs_patch
    assert any("patches/" in note for note in summary.notes)


@pytest.mark.parametrize(("target_bytes", "count"), [(1045, 1), (1089, 1), (1090, 2), (1180, 4), (10**9, 4)])
def test_target_bytes_keeps_the_most_that_fits(target_bytes: int, count: int) -> None:
    # 1000 + count * (10 + 30 + 5): 1045, 1090, 1135, 1180.
    assert counts(PlanRequest(Size(target_bytes=target_bytes))) == [count, count]


def test_target_bytes_below_the_smallest_count_is_refused() -> None:
    with pytest.raises(PlanError, match=r"below the 1045 bytes .* give --target-bytes 1045 or more"):
        counts(PlanRequest(Size(target_bytes=1044)))


def test_a_global_budget_of_bytes_weighs_share_by_byte() -> None:
    # Floor 1 + 1: 1045. Layer 0 gains 0.05 for 10 bytes (0.005), layer 1 0.25 for 30 (0.0083): layer 1 first, 1080 with
    # the MTP expert that follows the largest count, then 1115, 1150 and last layer 0: 1160.
    request = PlanRequest(Size(target_bytes=1115), budget="global")
    assert counts(request) == [1, 3]
    assert counts(PlanRequest(Size(target_bytes=1160), budget="global")) == [2, 4]


def test_below_the_floor_of_a_global_budget_is_refused() -> None:
    with pytest.raises(PlanError, match="floor of the global budget, 2 experts in 2 layers"):
        counts(PlanRequest(Size(keep_fraction=0.1), budget="global"))


def test_layers_that_draft_and_lost_tokens_are_noted() -> None:
    windows = (TWO_LAYERS.header.windows[0].model_copy(update={"complete": False}),)
    source = replace(TWO_LAYERS, header=TWO_LAYERS.header.model_copy(update={"windows": windows}))
    request = PlanRequest(Size(keep_experts=2))
    evidence = gather(source, request, ModelLimits("qwen3_moe", 4, 1))
    notes = summarise(evidence, decide(evidence, request.size), CHECKPOINT).notes
    assert any("1 of 1 windows of observation are incomplete" in note for note in notes)
    assert any("multi-token-prediction layers" in note for note in notes)


def test_a_sweep_tells_bytes_and_refusals() -> None:
    request = PlanRequest(Size(keep_fraction=0.5))
    evidence = gather(TWO_LAYERS, request, ModelLimits("qwen3_moe", 4, 2))
    rows = sweep(evidence, [0.75, 0.25, 0.5], CHECKPOINT)
    assert [row.keep_fraction for row in rows] == [0.25, 0.5, 0.75]
    assert rows[0].refused is not None
    assert "at least 2" in rows[0].refused
    assert (rows[1].keep_experts, rows[1].bytes_after) == (2, 1090)
    # Layer 0 keeps 18 of 20, layer 1 2 of 4.
    assert rows[1].retained_saliency == pytest.approx({"a": (0.9 + 0.5) / 2})
    assert rows[2].retained_saliency == pytest.approx({"a": (0.95 + 0.75) / 2})
