"""Counts that router, engine and kernels take, against the conditions read in vLLM 0.32."""

from __future__ import annotations

import pytest

from reap_serve.errors import PlanError
from reap_serve.plan.limits import CountLimits, ModelLimits, ServingTarget, count_limits, count_notes

QWEN = ModelLimits("qwen3_moe", 128, 8)
DEEPSEEK_V3 = ModelLimits("deepseek_v3", 256, 8, 8, 4, "fp8")


def refusal(limits: CountLimits, count: int) -> str:
    with pytest.raises(PlanError) as refused:
        limits.require(count, f"--keep-experts {count}")
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_a_plain_router_takes_every_count_from_top_k() -> None:
    assert count_limits(QWEN, ServingTarget()).allowed == tuple(range(8, 129))


def test_below_top_k_is_refused_with_the_nearest_count() -> None:
    assert refusal(count_limits(QWEN, ServingTarget()), 7) == (
        "--keep-experts 7 keeps 7 of 128 experts per layer, but it must be at least 8 (the router chooses top_k = 8 "
        "experts per token); keep 8 experts, or change the limit that is yours"
    )


@pytest.mark.parametrize("count", [0, 129, -3])
def test_outside_the_layer_is_refused(count: int) -> None:
    assert "from 1 to 128" in refusal(count_limits(QWEN, ServingTarget()), count)


def test_groups_stay_equal_larger_than_one_and_reach_top_k() -> None:
    # 8 groups, 4 open: 4 * n / 8 >= 8 needs n >= 16; equal groups need n % 8 == 0.
    assert count_limits(DEEPSEEK_V3, ServingTarget()).allowed == tuple(range(16, 257, 8))
    message = refusal(count_limits(DEEPSEEK_V3, ServingTarget()), 132)
    assert "a multiple of 8" in message
    assert "without a word" in message
    assert "keep 128 or 136 experts" in message


def test_groups_of_one_expert_are_refused() -> None:
    # vLLM's GroupedTopKRouter.valid_grouping asks for more experts than groups; top_k = 1 alone would allow 8.
    limits = count_limits(ModelLimits("deepseek_v3", 64, 1, 8, 8), ServingTarget())
    assert limits.smallest == 16


def test_limits_are_checked_together() -> None:
    limits = count_limits(DEEPSEEK_V3, ServingTarget(multiple_of=12, expert_parallel_size=32))
    assert limits.allowed == (96, 192)
    message = refusal(limits, 100)
    assert "multiple of 8" in message
    assert "--multiple-of" in message
    assert "--expert-parallel-size 32" in message
    assert "keep 96 or 192 experts" in message


def test_tensor_parallel_ranks_do_not_outnumber_experts() -> None:
    limits = count_limits(ModelLimits("mixtral", 8, 2), ServingTarget(tensor_parallel_size=8))
    assert limits.allowed == (8,)


def test_no_common_count_names_all_limits() -> None:
    with pytest.raises(PlanError, match=r"no count from 1 to 8 .* multiple of 5 .* multiple of 3"):
        count_limits(ModelLimits("mixtral", 8, 2), ServingTarget(multiple_of=5, expert_parallel_size=3))


def test_deepseek_v4_has_kernels_for_some_counts_only() -> None:
    limits = count_limits(ModelLimits("deepseek_v4", 384, 6), ServingTarget())
    assert limits.allowed == (8, 16, 32, 64, 128, 192, 256, 320, 384)
    assert "keep 64 or 128 experts" in refusal(limits, 96)


def test_tensorrt_llm_fp8_takes_multiples_of_four_when_it_is_chosen() -> None:
    model = ModelLimits("qwen3_moe", 1000, 8, quantization="fp8")
    chosen = count_limits(model, ServingTarget(moe_backend="flashinfer_trtllm"))
    assert set(chosen.allowed) == set(range(8, 513, 4))
    assert count_limits(model, ServingTarget(moe_backend="triton")).allowed == tuple(range(8, 1001))
    assert any("multiple of 4" in note for note in count_notes(model, ServingTarget(), (90,)))


def test_triton_sorts_fewer_than_1024_experts() -> None:
    assert count_limits(ModelLimits("qwen3_moe", 2048, 8), ServingTarget()).allowed[-1] == 1023


def test_an_untuned_count_is_noted_with_the_nearest_tuned_one() -> None:
    assert count_notes(QWEN, ServingTarget(), (64,)) == []
    assert count_notes(QWEN, ServingTarget(), (96,)) == [
        "vLLM ships no tuned Triton table for 96 experts and uses its default configuration; the nearest tuned counts "
        "are 72"
    ]


@pytest.mark.parametrize("option", ["multiple_of", "tensor_parallel_size", "expert_parallel_size"])
def test_a_target_below_one_is_refused(option: str) -> None:
    with pytest.raises(PlanError, match=f"--{option.replace('_', '-')} is 0"):
        ServingTarget(**{option: 0})
