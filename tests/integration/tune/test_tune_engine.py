"""Masks in one batch, on the embedded model in vLLM: every request answers as under its mask alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from unittest import mock

import numpy as np
import pytest

from reap_serve.demo.run import DOMAINS, demo_files
from reap_serve.model import open_model
from reap_serve.traffic.read import read_traffic
from reap_serve.tune.engine import Case, Mask, TuneEngine, open_engine
from reap_serve.tune.rules import mask_of

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 32, 2


@pytest.fixture(scope="module")
def engine() -> Iterator[TuneEngine]:
    # Two prompts of a batch and of none meet other matrix shapes: float32 keeps what that rounds below any tie.
    arguments = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 256}
    with (
        mock.patch.dict(os.environ, {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}),
        open_engine(open_model(str(demo_files().model)), range(NUM_LAYERS), arguments) as engine,
    ):
        yield engine


def cases_of(engine: TuneEngine, per_domain: int) -> list[Case]:
    found = []
    for domain in DOMAINS:
        found += list(islice(read_traffic([str(demo_files().heldout(domain))]), per_domain))
    return engine.cases(found)


def random_masks(count: int) -> list[Mask]:
    rng = np.random.default_rng(0)
    masks = []
    for number in range(count):
        kept_LE = np.zeros((NUM_LAYERS, NUM_EXPERTS), np.bool_)
        for row in kept_LE:
            row[rng.choice(NUM_EXPERTS, 16 + 2 * (number % 6), replace=False)] = True
        masks.append(mask_of(kept_LE))
    return masks


def require_alone_as_together(engine: TuneEngine, per_domain: int, num_masks: int, max_tokens: int) -> None:
    cases, masks = cases_of(engine, per_domain), random_masks(num_masks)
    under = [mask.id for mask in masks]
    engine.load(masks)
    together = engine.answer(
        [case for case in cases for _ in under], [mask for _ in cases for mask in under], max_tokens
    )
    assert len({tuple(answer.token_ids) for answer in together}) > len(cases)
    for number, mask in enumerate(masks):
        engine.load([mask])
        alone = engine.answer(cases, [mask.id] * len(cases), max_tokens)
        mixed = [answer.token_ids for answer in together[number :: len(masks)]]
        assert mixed == [answer.token_ids for answer in alone]


def test_requests_answer_in_a_batch_of_masks_as_under_each_alone(engine: TuneEngine) -> None:
    require_alone_as_together(engine, per_domain=2, num_masks=4, max_tokens=16)


@pytest.mark.slow
def test_two_hundred_requests_answer_under_eight_masks_as_under_each_alone(engine: TuneEngine) -> None:
    require_alone_as_together(engine, per_domain=40, num_masks=8, max_tokens=24)


def test_the_mask_that_keeps_everything_scores_as_the_model(engine: TuneEngine) -> None:
    cases = cases_of(engine, 2)
    whole = mask_of(np.ones((NUM_LAYERS, NUM_EXPERTS), np.bool_))
    engine.load([whole])
    plain, masked = engine.score(cases, [None] * len(cases)), engine.score(cases, [whole.id] * len(cases))
    for one, other in zip(plain, masked, strict=True):
        np.testing.assert_allclose(one.logprob_N, other.logprob_N, atol=1e-4)


def test_watched_gates_are_those_of_the_rows_that_predict_the_answer(engine: TuneEngine) -> None:
    cases = cases_of(engine, 2)
    mask = random_masks(1)[0]
    engine.load([mask])
    engine.score(
        [case for case in cases for _ in range(2)], [each for _ in cases for each in (None, mask.id)], watch=True
    )
    gates = engine.gates()
    # Requests of the full model alone are watched.
    assert sorted(gates) == list(range(0, 2 * len(cases), 2))
    for number, case in enumerate(cases):
        watched = gates[2 * number]
        rows = len(case.scored_tokens) - case.first_scored + 1
        assert watched.experts_TLK.shape == (rows, NUM_LAYERS, TOP_K)
        np.testing.assert_allclose(watched.gates_TLK.sum(axis=2), 1.0, atol=1e-3)
    assert engine.gates() == {}


def test_statistics_count_the_tokens_of_observed_requests_alone(engine: TuneEngine) -> None:
    cases = cases_of(engine, 2)
    mask = random_masks(1)[0]
    engine.load([mask])
    engine.score(cases, [mask.id] * len(cases))
    statistics = engine.observe(cases)
    engine.score(cases, [None] * len(cases))
    tokens = sum(len(case.forced.token_ids) for case in cases)
    assert int(statistics.layer_token_count_SPL[:, :, 0].sum()) == tokens
    assert int(statistics.sums.token_count_SPLE.sum()) == tokens * NUM_LAYERS * TOP_K
