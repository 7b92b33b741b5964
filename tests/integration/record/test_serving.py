"""What serving does to observation, and what observation does to serving."""

from __future__ import annotations

import logging
from pathlib import Path

import embedded_shape
import numpy as np
import pytest
import torch
from vllm_engine import COMPILED, EAGER, Answer, Prompt, ask, engine, observer, snapshot, spy_on_layers

from reap_serve.record.settings import ObserveSettings

SLICES = ("code", "prose", "tools")
RECORDERS = pytest.mark.parametrize(
    "settings",
    [
        ObserveSettings(recorder="inline", read_kernel_rows=False),
        ObserveSettings(recorder="deferred", read_kernel_rows=False),
        ObserveSettings(),
    ],
    ids=["inline", "deferred", "reading"],
)


def mixed(count: int, seed: int = 3, answer_tokens: int = 4) -> list[Prompt]:
    """Requests of three slices in turn, 3 to 90 tokens long."""
    random = np.random.default_rng(seed)
    return [
        Prompt(
            random.integers(0, embedded_shape.VOCABULARY, size=int(random.integers(3, 90))).tolist(),
            SLICES[number % len(SLICES)],
            answer_tokens,
        )
        for number in range(count)
    ]


@RECORDERS
def test_64_concurrent_requests_give_each_slice_what_it_gives_alone(
    embedded_model: Path, settings: ObserveSettings
) -> None:
    prompts = mixed(64)
    with engine(embedded_model, settings, max_num_batched_tokens=256) as llm:
        ask(llm, prompts)
        together = snapshot(llm)
        alone = {}
        for name in SLICES:
            llm.collective_rpc("reap_reset")
            ask(llm, [prompt for prompt in prompts if prompt.slice == name])
            alone[name] = snapshot(llm)
    assert sorted(together.slices) == sorted(SLICES)
    for name in SLICES:
        place = together.slices.index(name)
        own = alone[name].slices.index(name)
        np.testing.assert_array_equal(together.tokens_SPL[place], alone[name].tokens_SPL[own])
        np.testing.assert_array_equal(together.sums_SPLEC[place][..., 0], alone[name].sums_SPLEC[own][..., 0])
        np.testing.assert_allclose(together.sums_SPLEC[place], alone[name].sums_SPLEC[own], rtol=1e-5)
        np.testing.assert_allclose(together.maxima_SPLEC[place], alone[name].maxima_SPLEC[own], rtol=1e-5)
        assert alone[name].tokens_SPL.sum() == alone[name].tokens_SPL[own].sum() > 0


def test_tokens_of_a_preempted_request_are_counted_once(embedded_model: Path) -> None:
    # Seven blocks of 32 tokens are too few for three requests of 69 tokens, so one is computed anew.
    prompts = [Prompt(prompt.token_ids[:3] * 13, "default", 30) for prompt in mixed(3)]
    settings = ObserveSettings(recorder="deferred")
    with engine(embedded_model, settings, num_gpu_blocks_override=8, block_size=32, max_model_len=128) as llm:
        first_layer = spy_on_layers(llm)[0]
        ask(llm, prompts)
        window = snapshot(llm)
    assert sum(x_TH.shape[0] for x_TH, _, _ in first_layer.calls) > 3 * (39 + 29)
    assert window.tokens_SPL[0, :, 0].tolist() == [3 * 39, 3 * 29]


def test_a_cached_prefix_is_not_counted_but_reported(embedded_model: Path) -> None:
    prompt = Prompt(mixed(1)[0].token_ids[:4] * 30)
    with engine(embedded_model, ObserveSettings(), enable_prefix_caching=True, block_size=32) as llm:
        ask(llm, [prompt])
        ask(llm, [prompt])
        observed = snapshot(llm)
    # The second time, three whole blocks of 32 tokens come from the cache.
    assert observed.window.prompt_tokens_total == 240
    assert observed.window.prompt_tokens_computed == observed.tokens_SPL[0, :, 0].sum() == 120 + 24


def test_of_a_sample_every_token_is_counted_and_every_row_is_right(embedded_model: Path) -> None:
    prompts = mixed(48, answer_tokens=40)
    with engine(embedded_model, ObserveSettings(sample_fraction=0.1)) as llm:
        ask(llm, prompts)
        sampled = snapshot(llm)
        real_tokens = observer(llm)._sampler.real_tokens
        llm.collective_rpc("reap_reset")
        observer(llm)._sampler.fraction = observer(llm)._pace.fraction = 1.0
        ask(llm, prompts)
        whole = snapshot(llm)
    # The last token of an answer is not computed.
    assert real_tokens == sum(len(prompt.token_ids) + prompt.answer_tokens - 1 for prompt in prompts)
    assert real_tokens == whole.tokens_SPL[..., 0].sum()
    assert sampled.window.prompt_tokens_computed == whole.window.prompt_tokens_computed
    assert 0 < sampled.tokens_SPL[:, 1].sum() < whole.tokens_SPL[:, 1].sum() / 2
    # Of decode steps few are hooked, and they hold rows of every request: the mean norm over experts is alike.
    norms = [
        float(found.sums_SPLEC[:, 1, ..., 2].sum() / found.sums_SPLEC[:, 1, ..., 0].sum()) for found in (sampled, whole)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def answers(model: Path, settings: ObserveSettings | None, prompts: list[Prompt], **arguments: object) -> list[Answer]:
    torch._dynamo.reset()
    with engine(model, settings, dtype="bfloat16", **arguments) as llm:
        served = ask(llm, prompts, logprobs=3)
        # Under a budget recording begins at one step in a hundred, and such a run has not many more.
        if settings is not None and settings.overhead_budget is None:
            assert snapshot(llm).sums_SPLEC[..., 0].sum() > 0
    return served


@pytest.mark.parametrize("count", [pytest.param(24, id="24"), pytest.param(200, id="200", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_deferred_leaves_tokens_and_logprobs_as_they_are_to_the_bit(
    embedded_model: Path, mode: dict[str, object], count: int
) -> None:
    prompts = mixed(count, answer_tokens=6)
    plain = answers(embedded_model, None, prompts, **mode)
    copying = ObserveSettings(recorder="deferred", buffer_tokens=64, read_kernel_rows=False)
    assert answers(embedded_model, copying, prompts, **mode) == plain
    assert answers(embedded_model, ObserveSettings(recorder="deferred"), prompts, **mode) == plain
    if count > 24:
        assert answers(embedded_model, ObserveSettings(overhead_budget=0.02), prompts, **mode) == plain


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ObserveSettings(recorder="inline", read_kernel_rows=False), id="inline", marks=pytest.mark.slow),
        pytest.param(ObserveSettings(read_kernel_rows=False), id="deferred", marks=pytest.mark.slow),
        pytest.param(ObserveSettings(), id="reading"),
    ],
)
def test_a_compiled_model_gives_the_statistics_of_an_eager_one(embedded_model: Path, settings: ObserveSettings) -> None:
    prompts = mixed(12)
    found = []
    for mode in (EAGER, COMPILED):
        torch._dynamo.reset()
        with engine(embedded_model, settings, **mode) as llm:
            ask(llm, prompts)
            found.append(snapshot(llm))
    eager, compiled = found
    assert compiled.window.complete
    assert compiled.slices == eager.slices
    np.testing.assert_array_equal(compiled.tokens_SPL, eager.tokens_SPL)
    np.testing.assert_array_equal(compiled.sums_SPLEC[..., 0], eager.sums_SPLEC[..., 0])
    # Generated code adds in another order.
    np.testing.assert_allclose(compiled.sums_SPLEC, eager.sums_SPLEC, rtol=1e-4)
    np.testing.assert_allclose(compiled.maxima_SPLEC, eager.maxima_SPLEC, rtol=1e-4)


@RECORDERS
def test_a_recorder_that_raises_loses_no_request(
    embedded_model: Path, settings: ObserveSettings, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = mixed(9)
    with engine(embedded_model, None) as llm:
        plain = ask(llm, prompts)
    with engine(embedded_model, settings) as llm:
        broken = observer(llm).taps[2].recorder
        broken._sums = None  # the third layer of the first step raises
        with caplog.at_level(logging.ERROR, "reap_serve"):
            served = ask(llm, prompts)
        window = snapshot(llm).window
    assert [answer.token_ids for answer in served] == [answer.token_ids for answer in plain]
    assert not window.complete
    assert len([record for record in caplog.records if "recording stopped" in record.message]) == 1
