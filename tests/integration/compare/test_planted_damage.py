"""Damage that was planted in a real model is found in its slice and by its measure; the divergence is a lower bound.

Four servers are started: minutes on two cores. The expert that is taken away is the one whose share of one slice's
tokens exceeds that of every other slice by most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from damaged_models import (
    Tensors,
    answer_logprobs,
    answer_tokens,
    damaged,
    expert_share_by_slice,
    load,
    permute_router,
    repeat_forever,
    zero_expert,
)

from reap_serve.compare.assemble import report
from reap_serve.compare.divergence import kl_divergence
from reap_serve.compare.measure import Cases, CompareSettings, Measured, measure, prepare
from reap_serve.compare.scores import TOP_LOGPROBS, TokenScores
from reap_serve.compare.side import open_side
from reap_serve.compare.verdict import judge_slice
from reap_serve.traffic.read import read_traffic

EMBEDDED = Path(str(resources.files("reap_serve.demo"))) / "tiny_moe"
SLICES = ("code", "german", "tools")
# Requests of the first slice again, for which vLLM shall look for repetition itself: 8 times up to 4 tokens.
WATCHED, DETECTION = "watched", {"max_pattern_size": 4, "min_count": 8}
SETTINGS = CompareSettings(
    server_arguments=("--enforce-eager", "--max-model-len", "1024"),
    max_answer_tokens=48,
    answers_per_slice=6,
    latency_requests=0,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not (EMBEDDED / "model" / "config.json").is_file(), reason="the embedded model is not installed"
    ),
]


@pytest.fixture(scope="module")
def base() -> tuple[Cases, Measured]:
    requests = [
        request
        for name in SLICES
        for request in islice(read_traffic([str(EMBEDDED / "traffic" / f"{name}.heldout.jsonl")]), 25)
    ]
    requests += [
        replace(request, slice=WATCHED, body={**(request.body or {}), "repetition_detection": DETECTION})
        for request in requests[:10]
    ]
    with open_side(str(EMBEDDED / "model"), SETTINGS.server_arguments) as side:
        cases = prepare(side, requests, SETTINGS)
        return cases, measure(side, cases, SETTINGS, lambda: None, again=True)


@pytest.fixture(scope="module")
def damage(
    base: tuple[Cases, Measured], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Tensors], None]], tuple[Path, Measured]]:
    """Serves a damaged model and gives its directory and what was measured."""

    def make(name: str, change: Callable[[Tensors], None]) -> tuple[Path, Measured]:
        model = damaged(EMBEDDED / "model", tmp_path_factory.mktemp("damaged") / name, change)
        with open_side(str(model), SETTINGS.server_arguments) as side:
            return model, measure(side, base[0], SETTINGS, lambda: None)

    return make


def test_the_base_against_itself_is_the_noise_floor(base: tuple[Cases, Measured]) -> None:
    cases, measured = base
    for name, entry in report("base", "base", cases, measured, measured).slices.items():
        noise = entry.noise_floor
        assert noise is not None
        assert entry.quality.kl_divergence_max == 0.0
        assert entry.quality.same_top_token_fraction == 1.0
        print(f"noise floor of {name}: KL {noise.kl_divergence_mean:.2e}, top {noise.same_top_token_fraction:.2%}")
        # bf16 sums in another order: agreement but for near ties.
        assert noise.kl_divergence_mean < 1e-3
        assert noise.same_top_token_fraction > 0.99
        assert noise.perplexity_ratio == pytest.approx(1.0, abs=5e-3)


def test_a_permuted_router_is_beyond_the_limit_everywhere_and_the_divergence_is_a_lower_bound(
    base: tuple[Cases, Measured], damage: Callable[[str, Callable[[Tensors], None]], tuple[Path, Measured]]
) -> None:
    cases, measured = base
    model, candidate = damage("permuted", permute_router(1))
    for entry in report("base", "permuted", cases, measured, candidate).slices.values():
        assert entry.noise_floor is not None
        assert judge_slice(entry.quality).level == "beyond"
        assert entry.quality.intervals["kl_divergence_mean"][0] > 10 * entry.noise_floor.kl_divergence_mean

    whole, cells, served = [], [], []
    one, other = load(EMBEDDED / "model"), load(model)
    for index, case in enumerate(cases.forced):
        log_p, log_q = answer_logprobs(one, case), answer_logprobs(other, case)
        whole.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
        cells.append(kl_divergence(as_reported(log_p, answer_tokens(case)), as_reported(log_q, answer_tokens(case))))
        served.append(kl_divergence(measured.scores[index], candidate.scores[index]))
    whole_N, cells_N, served_N = map(np.concatenate, (whole, cells, served))
    print(
        f"KL over the vocabulary {whole_N.mean():.4f}, on the cells {cells_N.mean():.4f} "
        f"({1 - cells_N.mean() / whole_N.mean():.2%} below), on those that vLLM reports {served_N.mean():.4f}"
    )
    assert (cells_N <= whole_N + 1e-5).all()
    # Twenty tokens and one cell for the rest see most of it, where whole texts are upset as here by far the least.
    assert cells_N.mean() > 0.5 * whole_N.mean()
    # vLLM's and transformers' bf16 differ by rounding.
    assert served_N.mean() == pytest.approx(cells_N.mean(), rel=0.05)


def as_reported(logprob_NV: np.ndarray[tuple[int, ...], np.dtype[np.float64]], tokens: list[int]) -> TokenScores:
    top_ids_NK = np.argsort(-logprob_NV, axis=1, kind="stable")[:, :TOP_LOGPROBS]
    return TokenScores(
        np.array(tokens),
        logprob_NV[np.arange(len(tokens)), tokens],
        top_ids_NK,
        np.take_along_axis(logprob_NV, top_ids_NK, axis=1),
    )


def test_an_expert_taken_away_is_found_in_the_slice_that_uses_it(
    base: tuple[Cases, Measured], damage: Callable[[str, Callable[[Tensors], None]], tuple[Path, Measured]]
) -> None:
    cases, measured = base
    shares = expert_share_by_slice(load(EMBEDDED / "model"), [case for case in cases.forced if case.slice in SLICES])
    margins = {
        name: share - np.max([shares[other] for other in SLICES if other != name], axis=0)
        for name, share in shares.items()
    }
    hit = max(margins, key=lambda name: float(margins[name].max()))
    layer, expert = (int(place) for place in np.unravel_index(margins[hit].argmax(), margins[hit].shape))
    _, candidate = damage("zeroed", zero_expert(layer, expert))
    found = {name: entry.quality for name, entry in report("base", "zeroed", cases, measured, candidate).slices.items()}
    print(
        f"layer {layer}, expert {expert}: "
        + ", ".join(
            f"{name} {shares[name][layer, expert]:.1%} -> KL {found[name].kl_divergence_mean:.4f}" for name in SLICES
        )
    )
    noise = report("base", "base", cases, measured, measured).slices
    assert max(SLICES, key=lambda name: found[name].kl_divergence_mean) == hit
    floor = noise[hit].noise_floor
    assert floor is not None
    assert found[hit].intervals["kl_divergence_mean"][0] > floor.intervals["kl_divergence_mean"][1]


def test_a_model_that_repeats_itself_is_found_by_its_loops(
    base: tuple[Cases, Measured], damage: Callable[[str, Callable[[Tensors], None]], tuple[Path, Measured]]
) -> None:
    cases, measured = base
    _, candidate = damage("repeating", repeat_forever)
    for name, entry in report("base", "repeating", cases, measured, candidate).slices.items():
        quality = entry.quality
        assert quality.loop_fraction_candidate == 1.0
        # Where the traffic asks for it, vLLM itself ends a loop; elsewhere it runs to the longest length.
        assert quality.length_limit_fraction_candidate == (0.0 if name == WATCHED else 1.0)
        loops = next(found for found in judge_slice(quality).judgements if found.limit.name == "loop_fraction")
        print(f"loops {quality.loop_fraction_base:.0%} -> {quality.loop_fraction_candidate:.0%}, {loops.level}")
        if quality.loop_fraction_base == 0.0:
            assert loops.level == "beyond"
