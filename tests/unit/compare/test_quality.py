"""Figures of a slice, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from small_traffic import CALLED, WEATHER, chat

from reap_serve.compare.answers import Answer
from reap_serve.compare.bootstrap import share_interval
from reap_serve.compare.quality import AnswerPair, quality
from reap_serve.compare.record import Quality
from reap_serve.compare.scores import TokenScores


def scores(*rows: tuple[float, int]) -> TokenScores:
    """One token a row: the probability of token 1, and which token is likeliest; nothing else is reported."""
    probabilities = np.array([row[0] for row in rows])
    return TokenScores(
        np.ones(len(rows), np.int64),
        np.log(probabilities),
        np.array([[row[1], -1] for row in rows]),
        np.array([[math.log(max(row[0], 1 - row[0])), -np.inf] for row in rows]),
    )


BASE = [scores((0.5, 1), (0.5, 1)), scores((0.25, 2))]
CANDIDATE = [scores((0.25, 2), (0.5, 1)), scores((0.25, 2))]


def test_figures_of_tokens() -> None:
    found = quality(BASE, CANDIDATE)
    assert (found.requests, found.tokens, found.answers) == (2, 3, 0)
    assert found.perplexity_base == pytest.approx(16 ** (1 / 3))
    assert found.perplexity_candidate == pytest.approx(32 ** (1 / 3))
    assert found.perplexity_ratio == pytest.approx(2 ** (1 / 3))
    assert found.same_top_token_fraction == pytest.approx(2 / 3)
    assert found.mean_delta_p == pytest.approx(-0.25 / 3)
    assert found.rms_delta_p == pytest.approx(math.sqrt(0.0625 / 3))
    # Token 1 against the others: 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75), once in three tokens.
    divergence = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert found.kl_divergence_mean == pytest.approx(divergence / 3)
    assert found.kl_divergence_max == pytest.approx(divergence)
    assert found.kl_divergence_median == pytest.approx(0.0, abs=1e-12)
    assert found.loop_fraction_base is None


def test_perplexity_is_over_tokens_not_requests() -> None:
    assert quality(BASE, BASE).perplexity_base == pytest.approx((0.5 * 0.5 * 0.25) ** (-1 / 3))


def test_a_model_against_itself() -> None:
    found = quality(BASE, BASE)
    assert (found.perplexity_ratio, found.kl_divergence_max, found.same_top_token_fraction) == (1.0, 0.0, 1.0)
    assert found.intervals["perplexity_ratio"] == (1.0, 1.0)
    assert found.intervals["kl_divergence_p99"] == (0.0, 0.0)


def test_every_figure_but_counts_and_the_maximum_has_an_interval_around_it() -> None:
    generator = np.random.default_rng(3)
    base = [scores(*((p, 1) for p in generator.uniform(0.2, 0.8, size=20))) for _ in range(15)]
    candidate = [scores(*((p, 1) for p in generator.uniform(0.2, 0.8, size=20))) for _ in range(15)]
    loop, straight = Answer([1] * 40, "a" * 40, "length"), Answer(list(range(40)), "b", "stop")
    found = quality(base, candidate, [AnswerPair(chat("q"), straight, loop)] * 8)
    measured = {
        name for name in Quality.model_fields if isinstance(getattr(found, name), float) and name != "kl_divergence_max"
    }
    assert set(found.intervals) == measured
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) + 1e-12, name
        assert high >= getattr(found, name) - 1e-12, name


def test_figures_of_answers() -> None:
    tool = chat("q", CALLED, tools=[WEATHER])
    good = Answer([1, 2, 3], '<tool_call>{"name": "get_weather", "arguments": {"city": "Ulm"}}</tool_call>', "stop")
    pairs = [
        AnswerPair(tool, good, Answer([1, 2, 4], "It rains.", "stop")),
        AnswerPair(chat("q"), Answer([5], "yes", "stop"), Answer([5], "yes", "stop")),
        AnswerPair(chat("q"), Answer([6, 7], "no", "stop"), Answer([8] * 50, "nnn", "length")),
        AnswerPair(chat("q"), Answer([9], "x", "stop"), Answer([2], "", "stop")),
    ]
    found = quality(BASE, CANDIDATE, pairs)
    assert found.answers == 4
    assert found.same_answer_fraction == 0.25
    assert found.first_divergence_mean == (2 + 1 + 0 + 0) / 4
    assert (found.loop_fraction_base, found.loop_fraction_candidate) == (0.0, 0.25)
    assert (found.length_limit_fraction_base, found.length_limit_fraction_candidate) == (0.0, 0.25)
    assert (found.empty_fraction_base, found.empty_fraction_candidate) == (0.0, 0.25)
    assert found.tool_answers == 1
    assert (found.tool_call_valid_fraction_base, found.tool_call_valid_fraction_candidate) == (1.0, 0.0)
    assert (found.json_answers, found.json_valid_fraction_base) == (0, None)
    assert (found.language_answers, found.language_switch_fraction_base) == (0, None)
    assert found.intervals["loop_fraction_candidate"] == share_interval(1, 4)


def test_one_request_has_figures_and_no_intervals_of_tokens() -> None:
    found = quality(BASE[:1], CANDIDATE[:1], [AnswerPair(chat("q"), Answer([1], "a"), Answer([1], "a"))])
    assert "kl_divergence_mean" not in found.intervals
    assert "loop_fraction_base" in found.intervals


def test_perplexity_that_rests_on_one_request_is_marked() -> None:
    """The base is sure of 29 requests and at a loss at one; the candidate is at a loss at each."""
    base = [scores((0.98, 1), (0.99, 1)) for _ in range(29)] + [scores((0.01, 1), (0.99, 1))]
    generator = np.random.default_rng(3)
    candidate = [scores((p, 1), (1 - p, 1)) for p in generator.uniform(0.3, 0.7, size=30)]
    found = quality(base, candidate)
    assert "perplexity_base" in found.few_requests
    assert "perplexity_candidate" not in found.few_requests
    assert found.intervals["perplexity_base"][1] > 2 * found.perplexity_base - 1
    assert quality(base, base).few_requests == ("perplexity_base", "perplexity_candidate")
