"""How sure a cut is, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from statistics_of import random_statistics, statistics

from reap_serve.errors import PlanError
from reap_serve.plan.decision import Decision, Evidence, decide, gather
from reap_serve.plan.guards import drop_first
from reap_serve.plan.instability import instability, refuse_instability, refuse_unjudged
from reap_serve.plan.limits import ModelLimits
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.statistics.record import Statistics

TOP_K = 2
NUM_EXPERTS = 64


def noisy(num_tokens: int, spread: float, seed: int = 0) -> Statistics:
    """Statistics of experts whose g|f| is exponential, with true means 1 +- spread, drawn `num_tokens` times each."""
    rng = np.random.default_rng(seed)
    true_LE = 1 + spread * rng.standard_normal((4, NUM_EXPERTS))
    samples_LEN = np.abs(true_LE)[:, :, None] * rng.exponential(1.0, (4, NUM_EXPERTS, num_tokens))
    source = statistics({"a": (np.full((4, NUM_EXPERTS), num_tokens), samples_LEN.mean(axis=2))}, TOP_K)
    squares_SPLE = np.zeros_like(source.sums.weighted_norm_sq_sum_SPLE)
    squares_SPLE[0, 0] = (samples_LEN**2).sum(axis=2)
    return replace(source, sums=replace(source.sums, weighted_norm_sq_sum_SPLE=squares_SPLE))


def cut(source: Statistics, request: PlanRequest, model: ModelLimits | None = None) -> tuple[Evidence, Decision]:
    evidence = gather(source, request, model or ModelLimits("qwen3_moe", NUM_EXPERTS, TOP_K))
    return evidence, decide(evidence, request.size)


def test_the_expected_changes_are_those_of_another_run() -> None:
    request = PlanRequest(Size(0.5))
    evidence, decision = cut(noisy(100, 0.3), request)
    expected = instability(evidence, decision)
    assert expected is not None
    # The same experts, other tokens: the true means depend on the seed, so draw tokens again around them.
    rng = np.random.default_rng(0)
    true_LE = np.abs(1 + 0.3 * rng.standard_normal((4, NUM_EXPERTS)))
    changed = []
    for seed in range(1, 30):
        again_LE = true_LE * np.random.default_rng(seed).exponential(1.0, (4, NUM_EXPERTS, 100)).mean(axis=2)
        kept_LE = again_LE >= np.sort(again_LE, axis=1)[:, NUM_EXPERTS // 2, None]
        changed.append((kept_LE != decision.kept_LE).mean())
    assert expected.mean() == pytest.approx(np.mean(changed), rel=0.5)


def test_noise_is_refused_with_the_numbers_and_planned_with_force() -> None:
    request = PlanRequest(Size(0.5), max_instability=0.2)
    evidence, decision = cut(noisy(20, 0.02), request)
    with pytest.raises(PlanError, match=r"too unstable: .* the limit is 20.0% .* observe about \d+ tokens") as refused:
        refuse_instability(evidence, decision)
    assert "--force" in refused.value.remedy
    refuse_instability(*cut(noisy(20, 0.02), replace(request, force=True)))


def test_clear_differences_are_not_refused() -> None:
    evidence, decision = cut(noisy(2000, 0.4), PlanRequest(Size(0.5)))
    found = instability(evidence, decision)
    assert found is not None
    assert found.mean() < 0.05
    refuse_instability(evidence, decision)


def test_guarded_experts_never_change() -> None:
    source = noisy(20, 0.02)
    evidence, _ = cut(source, PlanRequest(Size(0.5)))
    # Half of the experts go whatever is seen of them, which leaves the judged half no choice.
    unsound_LE = np.zeros((4, NUM_EXPERTS), np.bool_)
    unsound_LE[:, ::2] = True
    evidence = replace(evidence, guards=drop_first(evidence.guards, unsound_LE))
    found = instability(evidence, decide(evidence, evidence.request.size))
    assert found is not None
    assert found.tolist() == [0.0] * 4


def test_a_cut_of_layers_without_a_judged_expert_is_refused_and_has_no_instability() -> None:
    request = PlanRequest(Size(0.5), min_tokens=21)
    evidence, decision = cut(noisy(20, 0.3), request)
    with pytest.raises(
        PlanError, match=r"in 4 of 4 layers every expert has fewer than --min-tokens 21 tokens"
    ) as found:
        refuse_unjudged(evidence, decision)
    assert found.value.remedy == "give --min-tokens 20 or less, observe more traffic, or give --force"
    assert instability(evidence, decision) is None
    refuse_unjudged(*cut(noisy(20, 0.3), replace(request, force=True)))
    refuse_unjudged(*cut(noisy(20, 0.3), replace(request, size=Size(1.0))))
    refuse_unjudged(*cut(noisy(20, 0.3), replace(request, min_tokens=20)))


def test_groups_are_cut_each_for_itself() -> None:
    source = noisy(20, 0.3)
    grouped = instability(*cut(source, PlanRequest(Size(0.5)), ModelLimits("deepseek_v3", NUM_EXPERTS, TOP_K, 4, 2)))
    assert grouped is not None
    assert grouped.shape == (4,)
    assert 0 < grouped.mean() < 0.5


@pytest.mark.parametrize("criterion", ["random", "gate_sum", "msan", "asq"])
def test_criteria_without_a_known_error_are_not_judged(criterion: str) -> None:
    evidence, decision = cut(random_statistics(1, 2, 64), PlanRequest(Size(0.5), criterion))
    assert instability(evidence, decision) is None
    refuse_instability(evidence, decision)


@pytest.mark.parametrize("limit", [-0.1, 1.1, float("nan")])
def test_a_limit_is_a_fraction(limit: float) -> None:
    with pytest.raises(PlanError, match="--max-instability is"):
        PlanRequest(Size(0.5), max_instability=limit)
