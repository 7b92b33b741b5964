"""The recorders on random checkpoints of the families that vLLM serves right on a CPU, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import served_families
import transformers_oracle as oracle
from vllm_engine import Prompt, Spy, ask, engine, record_by_reading, record_deferred, snapshot, spy_on_layers

from reap_serve.adapter.self_test import bfloat16_tolerance
from reap_serve.errors import EngineError
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums

# One of each kind of router; the others are as slow and tell less.
QUICK = ("qwen2_moe", "afmoe", "llama4_text", "gpt_oss", "gemma4_text")

RECOMPUTING = ObserveSettings(recorder="inline", read_kernel_rows=False)


def traffic() -> list[Prompt]:
    random = np.random.default_rng(7)
    return [
        Prompt(random.integers(3, served_families.VOCABULARY, size=length).tolist(), name, prompt_tokens=prompt_tokens)
        for name, length, prompt_tokens in (("code", 61, 50), ("prose", 17, 4), ("prose", 40, 40))
    ]


def parameters(bfloat16: bool) -> list[object]:
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name, family in served_families.FAMILIES.items()
        if family.bfloat16_only == bfloat16
    ]


@pytest.mark.parametrize("name", parameters(bfloat16=False))
def test_float32_sums_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    family = served_families.FAMILIES[name]
    served_families.build(family, tmp_path)
    prompts = traffic()
    sequences = [oracle.Served(p.token_ids, p.slice, p.prompt_tokens or 0) for p in prompts]
    # Before the engine: vLLM's Transformers backend changes classes of transformers.
    expected = oracle.sums(oracle.load(tmp_path), sequences, ("code", "prose"), served_families.NUM_EXPERTS)
    with engine(tmp_path, RECOMPUTING, **family.engine) as llm:
        ask(llm, prompts)
        inline = snapshot(llm)
        record_deferred(llm, buffer_tokens=50)
        ask(llm, prompts)
        deferred = snapshot(llm)
        record_by_reading(llm)
        ask(llm, prompts)
        read = snapshot(llm)
    for observed in (inline, deferred, read):
        assert observed.slices == ("code", "prose")
        assert observed.window.complete
        oracle.assert_equal(observed, expected, relative=1e-4)


@pytest.mark.parametrize("name", parameters(bfloat16=True))
def test_bfloat16_sums_are_as_close_as_this_machine_rounds(tmp_path: Path, name: str) -> None:
    family = served_families.FAMILIES[name]
    served_families.build(family, tmp_path)
    reference = oracle.load(tmp_path)
    # Each recorder against the calls that it saw: recomputed rows round otherwise, which moves choices of later layers.
    observed: list[tuple[RankSums, list[Spy]]] = []
    with engine(tmp_path, RECOMPUTING, dtype="bfloat16", **family.engine) as llm:
        for read in (False, True):
            if read:
                record_by_reading(llm)
            spies = spy_on_layers(llm)
            ask(llm, [Prompt(prompt.token_ids) for prompt in traffic()])
            observed.append((snapshot(llm), spies))
    for sums, spies in observed:
        expected = {
            field: np.zeros((len(spies), served_families.NUM_EXPERTS)) for field in (*oracle.FIELDS, *oracle.MAXIMA)
        }
        for place, (layer, spy) in enumerate(zip(sums.layers, spies, strict=True)):
            for x_TH, gate_TK, ids_TK in spy.calls:
                routed = oracle.unfuse(reference, layer.index, x_TH, gate_TK, ids_TK)
                oracle.add(expected, (place,), routed, slice(None))
        assert expected["token_count"].sum() == 118 * 2 * len(spies)
        oracle.assert_equal(
            sums, {field: value[None, None] for field, value in expected.items()}, relative=bfloat16_tolerance()
        )


@pytest.mark.parametrize(
    ("name", "reason"), [("ernie4_5_moe", "ernie4_5_moe cannot be observed: .* ignores the correction bias")]
)
def test_a_family_that_the_cpu_routes_wrongly_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    served_families.build(served_families.REFUSED[name], tmp_path)
    with pytest.raises(EngineError, match=reason), engine(tmp_path, ObserveSettings(recorder="inline")):
        pass
