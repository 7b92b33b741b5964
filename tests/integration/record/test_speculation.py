"""Speculative decoding: what is counted is what plain decoding counts, whatever was drafted and rejected."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served_families
from same_statistics import require_equal
from vllm_engine import Answer, answers_of, engine, observer

from reap_serve.model import fingerprint, open_model
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums, join_ranks
from reap_serve.records import provenance
from reap_serve.statistics.record import Statistics

# numba's, of vLLM's n-gram drafter.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]

SLICES = ("code", "prose", "tools")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
# Token 7 ends every third answer, wherever it stands.
STOP = 7


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine answered and counted.

    Attributes:
        answers: To all requests, sent at once.
        statistics: Of them; None without observation.
        masked: Answers to some of them sent again, every other one under a mask.
    """

    answers: list[Answer]
    statistics: Statistics | None
    masked: list[list[int]]

    @property
    def tokens(self) -> list[list[int]]:
        """Of the answers."""
        return [answer.token_ids for answer in self.answers]


def requests(count: int, masked: bool = False) -> list[tuple[list[int], Any]]:
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
            logprobs=2,
            extra_args={"reap_slice": SLICES[number % 3]} | ({"reap_plan_id": "half"} if masked and number % 2 else {}),
        )
        found.append((tokens, parameters))
    return found


def ask(llm: Any, asked: list[tuple[list[int], Any]]) -> list[Answer]:
    """Answers to the requests, all sent at once."""
    prompts = [{"prompt_token_ids": tokens} for tokens, _ in asked]
    return answers_of(llm.generate(prompts, [parameters for _, parameters in asked], use_tqdm=False))


def serve(model: Path, count: int, settings: ObserveSettings | None, **arguments: Any) -> Served:
    """Asks the full model and then, if it is observed, a mask, too."""
    with engine(model, settings, **arguments) as llm:
        answers = ask(llm, requests(count))
        if settings is None:
            return Served(answers, None, [])
        ranks = [RankSums.from_bytes(content) for content in llm.collective_rpc("reap_snapshot")]
        assert llm.collective_rpc("reap_load_masks", args=({"half": served_families.HALF},)) == [None]
        masked = ask(llm, requests(12, masked=True))
        running = observer(llm)
        assert running.failures == 0
        # What is under the mask is no traffic of the full model.
        found = join_ranks([running.snapshot()], fingerprint(open_model(str(model))), {}, provenance())
        assert found.header.windows[0].requests == count + 6
    statistics = join_ranks(ranks, fingerprint(open_model(str(model))), {}, provenance())
    return Served(answers, statistics, [answer.token_ids for answer in masked])


def require_served(found: Served, expected: Served) -> None:
    """What plain decoding answers and counts."""
    assert found.tokens == expected.tokens
    assert found.masked == expected.masked
    assert found.masked[1::2] != found.tokens[1:12:2]
    assert found.statistics is not None
    assert expected.statistics is not None
    require_equal(found.statistics, expected.statistics)


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
    ("family", "count", "thorough"),
    [
        ("qwen3_moe", 12, False),
        *(pytest.param(name, 60, True, marks=pytest.mark.slow) for name in served_families.FOUR),
    ],
)
def test_n_gram_drafts_count_as_far_as_they_are_taken(
    family: str, count: int, thorough: bool, four_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = four_models / family
    expected = serve(model, count, ObserveSettings(recorder="deferred"))
    for recorder in ("deferred", "inline") if thorough else ("deferred",):
        totals = count_drafts(monkeypatch)
        # A small buffer, so that it is also measured while a step awaits its verdict; kernel rows read and computed.
        settings = ObserveSettings(recorder=recorder, buffer_tokens=16, read_kernel_rows=recorder == "deferred")
        found = serve(model, count, settings, speculative_config=NGRAM)
        assert 0 < totals[1] < totals[0], "some drafts have to be taken, and some rejected"
        require_served(found, expected)
        if thorough and recorder == "deferred":
            assert found.answers == serve(model, count, None, speculative_config=NGRAM).answers


@pytest.mark.slow
@pytest.mark.parametrize("family", served_families.FOUR)
def test_a_draft_model_is_not_observed_and_its_drafts_count_as_far_as_they_are_taken(
    family: str, four_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = four_models / family
    expected = serve(model, 60, ObserveSettings(recorder="deferred"))
    totals = count_drafts(monkeypatch)
    # A Mixture-of-Experts model, too: its layers stand in the same context as the target's.
    speculation = {"method": "draft_model", "model": str(four_models / "qwen3_moe"), "num_speculative_tokens": 2}
    settings = ObserveSettings(recorder="deferred", buffer_tokens=16, read_kernel_rows=False)
    found = serve(model, 60, settings, speculative_config=speculation)
    assert 0 < totals[1] <= totals[0]
    require_served(found, expected)
    assert found.answers == serve(model, 60, None, speculative_config=speculation).answers
