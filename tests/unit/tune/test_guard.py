"""The guard: a plan beats REAP by more than noise, or REAP stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reap_serve.compare.bootstrap import Bootstrap
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


def test_of_one_slice_the_interval_is_that_of_the_ratio() -> None:
    rng = np.random.default_rng(0)
    tokens_C = rng.integers(5, 50, 12).astype(np.float64)
    plan_C, reap_C = rng.random(12), 1.0 + rng.random(12)
    found = difference({"a": RequestSums(plan_C, tokens_C)}, {"a": RequestSums(reap_C, tokens_C)})
    assert found.interval == pytest.approx(Bootstrap(12).ratio(plan_C - reap_C, tokens_C))
    assert is_lower(found)


def test_what_slices_differ_by_is_no_noise() -> None:
    # Every request of a slice gains the same: nothing is uncertain, however far apart the slices are.
    plan = {name: sums([0.0] * 4, [10.0] * 4) for name in ("a", "b")}
    reap = {"a": sums([100.0] * 4, [10.0] * 4), "b": sums([1.0] * 4, [10.0] * 4)}
    found = difference(plan, reap)
    assert found.interval == pytest.approx((found.kl_divergence_mean, found.kl_divergence_mean))
    assert found.kl_divergence_mean == pytest.approx(-5.05)


def test_two_alike_slices_halve_the_squared_error() -> None:
    rng = np.random.default_rng(1)
    tokens_C = np.full(40, 10.0)
    apart_C = rng.standard_normal(40)

    def width(names: tuple[str, ...]) -> float:
        plan: Mapping[str, RequestSums] = {name: RequestSums(apart_C, tokens_C) for name in names}
        reap = {name: RequestSums(np.zeros(40), tokens_C) for name in names}
        interval = difference(plan, reap).interval
        assert interval is not None
        return interval[1] - interval[0]

    assert width(("a", "b")) / width(("a",)) == pytest.approx(1 / math.sqrt(2), rel=0.15)


def test_a_gain_that_rests_on_one_request_is_noise() -> None:
    # The mean of nine requests is far lower, by one of them alone; the others say the opposite.
    tokens = [20.0] * 9
    plan, reap = sums([0.05] * 9, tokens), sums([8.0] + [0.02] * 8, tokens)
    found = difference({"a": plan}, {"a": reap})
    assert found.kl_divergence_mean < -0.03
    assert not is_lower(found)


def test_a_slice_of_one_request_leaves_the_noise_unknown() -> None:
    found = difference({"a": sums([0.0], [9.0])}, {"a": sums([5.0], [9.0])})
    assert found.interval is None
    assert not is_lower(found)


def test_the_same_plan_is_not_lower() -> None:
    same = {"a": sums([1.0, 2.0, 3.0], [9.0, 9.0, 9.0])}
    assert difference(same, same).interval == (0.0, 0.0)
    assert not is_lower(difference(same, same))


@pytest.mark.parametrize("num_slices", [1, 3])
def test_of_plans_that_are_alike_few_pass(num_slices: int) -> None:
    """At most 2.5 % should; heavy tails and few requests make that somewhat more."""
    rng = np.random.default_rng(2)
    passed = 0
    for _ in range(300):
        tokens_C = np.full(12, 10.0)
        slices = [str(number) for number in range(num_slices)]
        plan = {name: RequestSums(rng.lognormal(0.0, 1.0, 12), tokens_C) for name in slices}
        reap = {name: RequestSums(rng.lognormal(0.0, 1.0, 12), tokens_C) for name in slices}
        passed += is_lower(difference(plan, reap))
    assert passed <= 0.05 * 300


def tried(
    criterion: str, kl: float, interval: tuple[float, float] | None, *, held: bool = True, keep_experts: int = 8
) -> Tried:
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
    apart = None if criterion == "reap" else Difference(kl_divergence_mean=kl - 1.0, interval=interval)
    return Tried(chosen, "selection", figures, {}, apart)


def ranked(*some: Tried) -> list[str]:
    nothing: Any = None
    search = Search(nothing, (), nothing, (8,), 0, lambda line: None, tried=list(some))
    return [each.candidate.rule.name for each in search.ranked(8)]


def test_reap_stays_before_what_is_lower_within_noise_and_after_what_is_surely_lower() -> None:
    found = ranked(
        tried("asq", 0.5, (-1.2, 0.2)),
        tried("trials", 0.7, (-0.5, -0.1)),
        tried("reap", 1.0, None),
        tried("msan", 0.8, (-0.4, -0.1)),
        tried("random", 0.4, (-2.0, -1.0), keep_experts=9),
    )
    assert found == ["trials", "msan", "reap", "asq"]


def test_what_holds_comes_before_what_does_not_and_the_noise_decides_among_it() -> None:
    found = ranked(
        tried("trials", 0.2, (-1.0, -0.5), held=False),
        tried("reap", 1.0, None, held=False),
        tried("asq", 0.9, (-0.4, 0.2)),
        tried("msan", 0.95, (-0.3, -0.1)),
    )
    assert found == ["msan", "asq", "trials", "reap"]
