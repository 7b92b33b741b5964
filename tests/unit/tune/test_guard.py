"""The guard: a plan beats REAP by more than noise, or REAP stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reap_serve.tune.guard import RequestSums, difference, is_lower
from reap_serve.tune.record import Difference, Figures, LimitResult
from reap_serve.tune.search import Search, Tried


def sums(divergence: list[float], tokens: list[float]) -> RequestSums:
    return RequestSums(np.asarray(divergence), np.asarray(tokens))


def test_the_difference_is_the_mean_over_slices_of_divergence_per_token() -> None:
    tokens = {"a": [10.0, 30.0], "b": [1.0, 1.0, 2.0]}
    plan = {"a": sums([1.0, 3.0], tokens["a"]), "b": sums([2.0, 1.0, 1.0], tokens["b"])}
    reap = {"a": sums([2.0, 6.0], tokens["a"]), "b": sums([1.0, 1.0, 1.0], tokens["b"])}
    # (4 - 8) / 40 and (4 - 3) / 4.
    assert difference(plan, reap).kl_divergence_mean == pytest.approx((-0.1 + 0.25) / 2)


def test_the_p_value_is_the_share_of_signs_that_give_as_little() -> None:
    # Differences -1, +2, -3 ... -7. Of 2^7 choices of signs three give -24 or less: all negative (-28), all but the 1
    # (-26), and all but the 2, which is what was found.
    reap = {"a": sums([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0] * 7)}
    plan = {"a": sums([0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0] * 7)}
    found = difference(plan, reap)
    assert found.kl_divergence_mean == pytest.approx(-24 / 7)
    assert found.p_value == pytest.approx(3 / 128, abs=0.004)


def test_what_slices_differ_by_is_no_noise() -> None:
    # Every request gains alike within its slice, however far apart the slices are.
    plan = {name: sums([0.0] * 4, [10.0] * 4) for name in ("a", "b")}
    reap = {"a": sums([100.0] * 4, [10.0] * 4), "b": sums([1.0] * 4, [10.0] * 4)}
    found = difference(plan, reap)
    assert found.kl_divergence_mean == pytest.approx(-5.05)
    assert found.p_value == pytest.approx(1 / 256, abs=0.002)
    assert is_lower(found)


def test_a_gain_that_rests_on_one_request_is_noise() -> None:
    # The mean of nine requests is far lower, by one of them alone; the others say the opposite.
    tokens = [20.0] * 9
    plan, reap = sums([0.05] * 9, tokens), sums([8.0] + [0.02] * 8, tokens)
    found = difference({"a": plan}, {"a": reap})
    assert found.kl_divergence_mean < -0.03
    assert not is_lower(found)


@pytest.mark.parametrize(("count", "passes"), [(4, False), (5, True)])
def test_below_five_requests_nothing_passes(count: int, passes: bool) -> None:
    found = difference({"a": sums([0.0] * count, [9.0] * count)}, {"a": sums([5.0] * count, [9.0] * count)})
    assert is_lower(found) is passes


def test_a_gain_too_small_to_matter_does_not_pass() -> None:
    found = difference({"a": sums([0.0] * 20, [10.0] * 20)}, {"a": sums([0.009] * 20, [10.0] * 20)})
    assert found.p_value < 0.001
    assert found.kl_divergence_mean == pytest.approx(-0.0009)
    assert not is_lower(found)


def test_the_same_plan_is_not_lower() -> None:
    same = {"a": sums([1.0, 2.0, 3.0], [9.0, 9.0, 9.0])}
    assert difference(same, same) == Difference(kl_divergence_mean=0.0, p_value=1.0)
    assert not is_lower(difference(same, same))


@pytest.mark.parametrize("num_slices", [1, 3])
def test_of_plans_that_are_alike_few_pass(num_slices: int) -> None:
    rng = np.random.default_rng(2)
    passed = 0
    for _ in range(100):
        tokens_C = np.full(12, 10.0)
        slices = [str(number) for number in range(num_slices)]
        plan = {name: RequestSums(rng.lognormal(0.0, 1.0, 12), tokens_C) for name in slices}
        reap = {name: RequestSums(rng.lognormal(0.0, 1.0, 12), tokens_C) for name in slices}
        passed += is_lower(difference(plan, reap))
    # 5 % of 100, with a standard deviation of 2.2.
    assert passed <= 12


def tried(criterion: str, kl: float, p_value: float, *, held: bool = True, keep_experts: int = 8) -> Tried:
    rule: Any = SimpleNamespace(name=criterion, criterion=criterion, is_reap=criterion == "reap")
    chosen: Any = SimpleNamespace(rule=rule, keep_experts=keep_experts)
    limit = LimitResult(limit="a limit", value=1.0, held=held)
    figures = Figures(
        kl_divergence_mean=kl,
        perplexity_ratio={},
        kl_divergence={},
        same_answer_fraction={},
        tool_calls_lost={},
        limits=(limit,),
    )
    apart = None if criterion == "reap" else Difference(kl_divergence_mean=kl - 1.0, p_value=p_value)
    return Tried(chosen, "selection", figures, {}, apart)


def ranked(*some: Tried) -> list[str]:
    nothing: Any = None
    search = Search(nothing, (), nothing, (8,), 0, lambda line: None, tried=list(some))
    return [each.candidate.rule.name for each in search.ranked(8)]


def test_reap_stays_before_what_is_lower_within_noise_and_after_what_is_surely_lower() -> None:
    found = ranked(
        tried("asq", 0.5, 0.06),
        tried("trials", 0.7, 0.001),
        tried("reap", 1.0, 1.0),
        tried("msan", 0.8, 0.04),
        tried("random", 0.4, 0.001, keep_experts=9),
    )
    assert found == ["trials", "msan", "reap", "asq"]


def test_what_holds_comes_before_what_does_not_and_the_noise_decides_among_it() -> None:
    found = ranked(
        tried("trials", 0.2, 0.001, held=False),
        tried("reap", 1.0, 1.0, held=False),
        tried("asq", 0.9, 0.2),
        tried("msan", 0.95, 0.001),
    )
    assert found == ["msan", "asq", "trials", "reap"]
