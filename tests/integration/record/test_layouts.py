"""Engines of several ranks, in processes of their own: merged over ranks, they count what one process counts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served_families
from layout_engines import content, make_site, run_engine
from same_statistics import require_equal

from reap_serve.adapter.worker import WORKER_EXTENSION
from reap_serve.model import fingerprint, open_model
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import prune
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums, join_ranks
from reap_serve.records import provenance
from reap_serve.serve.join_status import first_of_engines, join_gate_mass, join_slices
from reap_serve.serve.live_status import RankStatus
from reap_serve.statistics.merge import merge
from reap_serve.statistics.record import Statistics

pytestmark = pytest.mark.timeout(1800)

SLICES = ("code", "prose", "tools")
LAYOUTS: Mapping[str, Mapping[str, object]] = {
    "TP2": {"tensor_parallel_size": 2},
    "TP2-EP": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "DP2": {"data_parallel_size": 2},
    "DP2-EP": {"data_parallel_size": 2, "enable_expert_parallel": True},
}


@dataclass(frozen=True, slots=True)
class Observed:
    """What an engine answered and counted.

    Attributes:
        answers: Tokens of each of the full model's answers.
        statistics: Merged over ranks.
        masked_answers: Tokens of answers, of which every other one is a mask's.
        statuses: Of all ranks, after those.
    """

    answers: list[list[int]]
    statistics: Statistics
    masked_answers: list[list[int]]
    statuses: list[RankStatus]


Alone = Callable[[str], Observed]
# What ranks do differently is all in it: they share experts, and measure together.
QUICK = ("qwen3_moe", "DP2-EP")
PAIRS = [(family, layout) for family in served_families.FOUR for layout in LAYOUTS]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched vLLM and the laboratory."""
    return make_site(tmp_path_factory.mktemp("site"))


def engines_of(layout: Mapping[str, object]) -> int:
    """How many data-parallel engines there are."""
    return int(str(layout.get("data_parallel_size", 1)))


def prompts(engines: int) -> list[dict[str, object]]:
    """60 requests of three slices; each engine sees the slices in another order, and some see one of them alone."""
    random = np.random.default_rng(3)
    found = []
    for number in range(60):
        length = int(random.integers(3, 30))
        found.append(
            {
                "token_ids": random.integers(3, served_families.VOCABULARY, size=length).tolist(),
                "slice": SLICES[(number * number + number // 20) % 3],
                "answer_tokens": int(random.integers(1, 8)),
                "prompt_tokens": length // 2 if number % 4 == 0 else None,
                "rank": (number // 3) % engines if engines > 1 else None,
                "logprobs": 2,
            }
        )
    return found


def observing(layout: Mapping[str, object], **settings: Any) -> dict[str, object]:
    """Arguments of an engine that observes with a buffer so small that it is measured many times."""
    given = {"buffer_tokens": 24, "minimum_tokens": 0, "drift_fraction": 1.0} | settings
    chosen = ObserveSettings.model_validate(given).model_dump()
    return {**layout, "worker_extension_cls": WORKER_EXTENSION, "additional_config": {"reap_serve": chosen}}


def statistics_of(model: Path, replies: Sequence[str], engines: int) -> Statistics:
    """What the ranks of all engines tell, as one."""
    ranks = [RankSums.from_bytes(content(reply)) for reply in replies]
    each = len(ranks) // engines
    source = fingerprint(open_model(str(model)))
    parts = [join_ranks(ranks[first : first + each], source, {}, provenance()) for first in range(0, len(ranks), each)]
    return merge(parts) if len(parts) > 1 else parts[0]


def tokens_of(answers: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The tokens of each answer."""
    return [answer["token_ids"] for answer in answers]


def observed(site: Path, model: Path, layout: Mapping[str, object], job: Path) -> Observed:
    """Asks the full model and then a mask, too."""
    engines = engines_of(layout)
    masked = [prompt | {"plan": "half" if number % 2 else None} for number, prompt in enumerate(prompts(engines)[:20])]
    steps: list[Mapping[str, object]] = [
        {"call": "reap_reset"},
        {"ask": prompts(engines)},
        {"settle": True},
        {"call": "reap_snapshot"},
        {"call": "reap_load_masks", "args": [{"half": served_families.HALF}]},
        {"ask": masked},
        {"settle": True},
        {"call": "reap_status"},
    ]
    _, answers, _, replies, problems, masked_answers, _, found = run_engine(site, model, observing(layout), steps, job)
    assert not any(problems)
    statuses = [RankStatus.model_validate(status) for status in found]
    assert len(statuses) == engines * int(str(layout.get("tensor_parallel_size", 1)))
    assert [status.engine for status in statuses] == sorted(status.engine for status in statuses)
    assert all(status.failures == 0 and status.complete for status in statuses)
    return Observed(tokens_of(answers), statistics_of(model, replies, engines), tokens_of(masked_answers), statuses)


@pytest.fixture(scope="module")
def alone(site: Path, four_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What one process answers and counts, by family; each is asked once."""
    job = tmp_path_factory.mktemp("alone") / "job.json"
    return functools.cache(lambda family: observed(site, four_models / family, {}, job))


@pytest.mark.parametrize(
    ("family", "layout"), [pytest.param(*pair, marks=() if pair == QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_ranks_together_answer_and_count_as_one_process(
    family: str, layout: str, site: Path, four_models: Path, alone: Alone, tmp_path: Path
) -> None:
    found, expected = observed(site, four_models / family, LAYOUTS[layout], tmp_path / "job.json"), alone(family)
    assert found.answers == expected.answers
    require_equal(found.statistics, expected.statistics)
    # Requests under the mask are answered by it, and are not counted.
    assert found.masked_answers == expected.masked_answers
    assert found.masked_answers[1::2] != found.answers[1:20:2]
    masked = [sum(status.tokens_masked for status in first_of_engines(each.statuses)) for each in (found, expected)]
    assert masked[0] == masked[1] > 0
    assert join_slices(found.statuses) == join_slices(expected.statuses)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_an_engine_without_observation(
    layout: str, site: Path, four_models: Path, tmp_path: Path
) -> None:
    """One request at a time: which requests share a step decides how its sums are rounded."""
    model, engines = four_models / "exaone_moe", engines_of(LAYOUTS[layout])
    steps = [{"ask": prompts(engines)[:16], "together": False}]
    (plain,) = run_engine(site, model, LAYOUTS[layout], steps, tmp_path / "plain.json")
    (found,) = run_engine(site, model, observing(LAYOUTS[layout]), steps, tmp_path / "observed.json")
    assert found == plain


@pytest.fixture(scope="module")
def pruned(four_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of half of the experts, with its sidecar."""
    model, folder = four_models / "exaone_moe", tmp_path_factory.mktemp("pruned")
    # Its first layer is dense.
    kept = served_families.HALF["1"]
    dropped = sorted({*range(served_families.NUM_EXPERTS)} - {*kept})
    layer = {"layer": "model.layers.1.mlp.experts", "index": 1, "kept": kept, "dropped": dropped}
    plan = {"schema_version": 1, "model": {}, "criterion": "by hand", "layers": [layer]}
    (folder / "plan.json").write_text(json.dumps(plan))
    options = PruneOptions(MtpChoice.CUT, shard_bytes=1 << 30, jobs=1)
    prune(str(model), folder / "plan.json", folder / "half", options, overwrite=False)
    return folder / "half"


def shadowed(site: Path, model: Path, layout: Mapping[str, object], job: Path) -> dict[str, float]:
    """Gate mass of experts that a pruned model lacks, by slice; under data parallelism an engine has its own slices."""
    engines = engines_of(layout)
    asked = [
        prompt | {"rank": SLICES.index(str(prompt["slice"])) % engines if engines > 1 else None}
        for prompt in prompts(engines)[:24]
    ]
    steps: list[Mapping[str, object]] = [{"ask": asked}, {"call": "reap_status"}]
    _, found = run_engine(site, model, observing(layout), steps, job)
    report = join_gate_mass([RankStatus.model_validate(status) for status in found])
    assert report.pruned
    assert report.refusal is None
    return report.served


@pytest.fixture(scope="module")
def shadowed_alone(site: Path, pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The same of one process."""
    return shadowed(site, pruned, {}, tmp_path_factory.mktemp("alone") / "shadow.json")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shadow_router_sees_what_one_process_sees(
    layout: str, site: Path, pruned: Path, shadowed_alone: Mapping[str, float], tmp_path: Path
) -> None:
    found = shadowed(site, pruned, LAYOUTS[layout], tmp_path / "job.json")
    assert found == pytest.approx(shadowed_alone, rel=1e-5)
    assert all(0 < found[name] < 1 for name in SLICES)


@pytest.mark.slow
def test_ranks_under_a_budget_sample_the_same_tokens(site: Path, four_models: Path, tmp_path: Path) -> None:
    """Each has a clock of its own; the first one's counts."""
    # Of tokens rarely sampled, two are a reason to look at the clock again.
    settings = {"overhead_budget": 0.9, "buffer_tokens": 2}
    layout = LAYOUTS["TP2"]
    asked = {"ask": prompts(1), "together": False}
    statuses: list[Mapping[str, object]] = [{"call": "reap_status"}, {"call": "reap_snapshot"}]
    results = run_engine(
        site,
        four_models / "qwen3_moe",
        observing(layout, **settings),
        [asked, *statuses, asked, *statuses, asked, *statuses],
        tmp_path / "job.json",
    )
    fractions = []
    for _, found, replies in zip(results[::3], results[1::3], results[2::3], strict=True):
        ranks = [RankStatus.model_validate(status) for status in found]
        sums = [RankSums.from_bytes(content(reply)) for reply in replies]
        assert ranks[0].sample_fraction == ranks[1].sample_fraction
        assert ranks[0].tokens_observed == ranks[1].tokens_observed > 0
        assert ranks[0].busy_seconds != ranks[1].busy_seconds
        np.testing.assert_array_equal(sums[0].tokens_SPL, sums[1].tokens_SPL)
        np.testing.assert_array_equal(sums[0].sums_SPLEC, sums[1].sums_SPLEC)
        fractions.append(ranks[0].sample_fraction)
    # It moved, and is no bound that both could have come to by themselves.
    assert not {0.01, 1.0} & set(fractions[1:])
