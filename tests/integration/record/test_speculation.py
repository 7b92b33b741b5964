"""Speculative decoding: what is counted is what plain decoding counts, whatever was drafted and rejected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served_families
from vllm_engine import engine, observer

from reap_serve.model import fingerprint, open_model
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums, join_ranks
from reap_serve.records import provenance
from reap_serve.statistics.record import Statistics

# numba's, of vLLM's n-gram drafter.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]

# Softmax; sigmoid with groups, a correction bias and shared experts; shared experts; the weight on the input.
FAMILIES = ("qwen3_moe", "exaone_moe", "qwen2_moe", "llama4_text")
SLICES = ("code", "prose", "tools")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
# Token 7 ends every third answer, wherever it stands.
STOP = 7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, each in a folder of its name, and another one to draft."""
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        served_families.build(served_families.FAMILIES[name], folder / name)
    return folder


def requests(count: int) -> list[tuple[list[int], Any]]:
    """Prompts that repeat themselves, so that drafts are found, and how they are answered."""
    from vllm import SamplingParams

    random = np.random.default_rng(5)
    found = []
    for number in range(count):
        motif = random.integers(3, served_families.VOCABULARY, size=int(random.integers(2, 6)))
        tokens = np.tile(motif, 8)[: int(random.integers(6, 24))].tolist()
        parameters = SamplingParams(
            max_tokens=int(random.integers(1, 24)),
            temperature=0.0,
            ignore_eos=number % 3 > 0,
            stop_token_ids=[STOP, *range(60, 80)] if number % 3 == 0 else None,
            detokenize=False,
            extra_args={"reap_slice": SLICES[number % 3]},
        )
        found.append((tokens, parameters))
    return found


def serve(model: Path, count: int, settings: ObserveSettings, **arguments: Any) -> tuple[list[list[int]], Statistics]:
    """Answers to the requests, all sent at once, and their statistics."""
    with engine(model, settings, **arguments) as llm:
        prompts = requests(count)
        given = [{"prompt_token_ids": tokens} for tokens, _ in prompts]
        outputs = llm.generate(given, [parameters for _, parameters in prompts], use_tqdm=False)
        ranks = [RankSums.from_bytes(content) for content in llm.collective_rpc("reap_snapshot")]
        assert observer(llm).failures == 0
    statistics = join_ranks(ranks, fingerprint(open_model(str(model))), {}, provenance())
    return [list(output.outputs[0].token_ids) for output in outputs], statistics


def require_equal(found: Statistics, expected: Statistics) -> None:
    """Counts exactly, sums to 1e-5, whatever the order in which slices were seen."""
    order = [found.header.slices.index(name) for name in expected.header.slices]
    np.testing.assert_array_equal(found.layer_token_count_SPL[order], expected.layer_token_count_SPL)
    values = found.fields_by_name()
    for name, field in expected.fields_by_name().items():
        if "layer_token" in name:
            continue
        exact = "count" in name
        np.testing.assert_allclose(values[name][order], field, rtol=0 if exact else 1e-5, err_msg=name)
    assert found.header.complete
    assert found.header.windows[0].requests == expected.header.windows[0].requests
    assert found.header.windows[0].prompt_tokens_computed == expected.header.windows[0].prompt_tokens_computed


def count_drafts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Draft tokens that were verified, and those of them that were taken."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    totals, forward = [0, 0], RejectionSampler.forward

    def counted(self: Any, metadata: Any, *rest: Any, **named: Any) -> Any:
        output = forward(self, metadata, *rest, **named)
        for drafts, row in zip(metadata.num_draft_tokens, output.sampled_token_ids.tolist(), strict=True):
            totals[0] += drafts
            totals[1] += min(drafts, sum(token >= 0 for token in row) - 1)
        return output

    monkeypatch.setattr(RejectionSampler, "forward", counted)
    return totals


@pytest.mark.parametrize(
    ("family", "count", "recorders"),
    [
        ("qwen3_moe", 12, ("deferred",)),
        *(pytest.param(name, 60, ("deferred", "inline"), marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_n_gram_drafts_count_as_far_as_they_are_taken(
    family: str, count: int, recorders: Sequence[str], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models / family
    answers, expected = serve(model, count, ObserveSettings(recorder="deferred"))
    for recorder in recorders:
        totals = count_drafts(monkeypatch)
        # A small buffer, so that it is also measured while a step awaits its verdict; kernel rows read and computed.
        settings = ObserveSettings(recorder=recorder, buffer_tokens=16, read_kernel_rows=recorder == "deferred")
        drafted, found = serve(model, count, settings, speculative_config=NGRAM)
        assert drafted == answers
        assert 0 < totals[1] < totals[0], "some drafts have to be taken, and some rejected"
        require_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_model_is_not_observed_and_its_drafts_count_as_far_as_they_are_taken(
    family: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models / family
    answers, expected = serve(model, 60, ObserveSettings(recorder="deferred"))
    totals = count_drafts(monkeypatch)
    # A Mixture-of-Experts model, too: its layers stand in the same context as the target's.
    speculation = {"method": "draft_model", "model": str(models / "qwen3_moe"), "num_speculative_tokens": 2}
    settings = ObserveSettings(recorder="deferred", buffer_tokens=16, read_kernel_rows=False)
    drafted, found = serve(model, 60, settings, speculative_config=speculation)
    assert drafted == answers
    assert 0 < totals[1] <= totals[0]
    require_equal(found, expected)
