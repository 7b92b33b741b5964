"""Observation of a model of the embedded shape against transformers."""

from __future__ import annotations

from pathlib import Path

import embedded_shape
import numpy as np
import pytest
import transformers_oracle as oracle
from vllm_engine import Prompt, ask, engine, snapshot, spy_on_layers

from reap_serve.record.settings import ObserveSettings

LENGTHS = {"code": (61, 3, 128), "prose": (17, 40), "tools": (5,)}


def traffic() -> list[Prompt]:
    random = np.random.default_rng(7)
    return [
        Prompt(random.integers(0, embedded_shape.VOCABULARY, size=length).tolist(), name, answer_tokens)
        for name, lengths in LENGTHS.items()
        for length, answer_tokens in zip(lengths, (6, 1, 9), strict=False)
    ]


@pytest.mark.parametrize("recorder", ["inline", "deferred"])
def test_float32_sums_equal_those_of_transformers(embedded_model: Path, recorder: str) -> None:
    prompts = traffic()
    settings = ObserveSettings(recorder=recorder, buffer_tokens=50, extra_sums=("output_sum", "logit_gram"))
    with engine(embedded_model, settings) as llm:
        answers = ask(llm, prompts)
        observed = snapshot(llm)
    # The last token of an answer never enters the model.
    sequences = [
        oracle.Served(prompt.token_ids + answer.token_ids[:-1], prompt.slice, len(prompt.token_ids))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    expected = oracle.sums(oracle.load(embedded_model), sequences, observed.slices, embedded_shape.NUM_EXPERTS)
    oracle.assert_equal(observed, expected, relative=1e-4)
    output_LEH, gram_LEE = oracle.vector_sums(oracle.load(embedded_model), sequences, embedded_shape.NUM_EXPERTS)
    for name, wanted in (("output_sum", output_LEH), ("logit_gram", gram_LEE)):
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(observed.extra[name].sum(axis=(0, 1)), wanted, rtol=1e-4, atol=1e-4 * largest)
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    assert observed.tokens_SPL.sum(axis=(0, 1)).tolist() == [tokens] * embedded_shape.NUM_LAYERS
    assert observed.sums_SPLEC[..., 0].sum() == embedded_shape.TOP_K * tokens * embedded_shape.NUM_LAYERS
    assert observed.window.complete
    assert observed.window.requests == len(prompts)
    assert observed.window.prompt_tokens_computed == observed.window.prompt_tokens_total == 254


@pytest.mark.parametrize("recorder", ["inline", "deferred"])
def test_bfloat16_sums_are_within_a_percent_of_float32_for_the_same_routed_inputs(
    embedded_model: Path, recorder: str
) -> None:
    settings = ObserveSettings(recorder=recorder, buffer_tokens=50)
    with engine(embedded_model, settings, dtype="bfloat16") as llm:
        spies = spy_on_layers(llm)
        ask(llm, [Prompt(prompt.token_ids) for prompt in traffic()])
        observed = snapshot(llm)
    reference = oracle.load(embedded_model).bfloat16().float()
    shape = (embedded_shape.NUM_LAYERS, embedded_shape.NUM_EXPERTS)
    expected = {name: np.zeros(shape) for name in (*oracle.FIELDS, *oracle.MAXIMA)}
    for number, spy in enumerate(spies):
        for x_TH, gate_TK, ids_TK in spy.calls:
            oracle.add(expected, (number,), oracle.unfuse(reference, number, x_TH, gate_TK, ids_TK), slice(None))
    assert expected["token_count"].sum() == 254 * embedded_shape.TOP_K * embedded_shape.NUM_LAYERS
    oracle.assert_equal(observed, {name: value[None, None] for name, value in expected.items()}, relative=1e-2)
