"""Engines of several ranks, in processes of their own: merged over ranks, they count what one process counts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served_families
from layout_engines import content, make_site, run_engine

from reap_serve.adapter.worker import WORKER_EXTENSION
from reap_serve.model import fingerprint, open_model
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums, join_ranks
from reap_serve.records import provenance
from reap_serve.statistics.merge import merge
from reap_serve.statistics.record import Statistics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Softmax; sigmoid with groups, a correction bias and shared experts; shared experts; the weight on the input.
FAMILIES = ("qwen3_moe", "exaone_moe", "qwen2_moe", "llama4_text")
SLICES = ("code", "prose", "tools")
LAYOUTS: Mapping[str, Mapping[str, object]] = {
    "TP2": {"tensor_parallel_size": 2},
    "TP2-EP": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "DP2": {"data_parallel_size": 2},
    "DP2-EP": {"data_parallel_size": 2, "enable_expert_parallel": True},
}

Alone = Callable[[str], tuple[list[Any], Statistics]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched vLLM and the laboratory."""
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        served_families.build(served_families.FAMILIES[name], folder / name)
    return folder


def prompts(ranks: int) -> list[dict[str, object]]:
    """60 requests of three slices; each rank sees the slices in another order, and some see one of them alone."""
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
                "rank": (number // 3) % ranks if ranks > 1 else None,
                "logprobs": 2,
            }
        )
    return found


def observing(layout: Mapping[str, object], **settings: Any) -> dict[str, object]:
    """Arguments of an engine that observes with a buffer so small that it is measured many times."""
    chosen = ObserveSettings(buffer_tokens=24, minimum_tokens=0, untried_layouts=True, **settings).model_dump()
    return {**layout, "worker_extension_cls": WORKER_EXTENSION, "additional_config": {"reap_serve": chosen}}


def statistics_of(model: Path, replies: Sequence[str], engines: int) -> Statistics:
    """What the ranks of all engines tell, as one."""
    ranks = [RankSums.from_bytes(content(reply)) for reply in replies]
    each = len(ranks) // engines
    source = fingerprint(open_model(str(model)))
    parts = [join_ranks(ranks[first : first + each], source, {}, provenance()) for first in range(0, len(ranks), each)]
    return merge(parts) if len(parts) > 1 else parts[0]


def observed(site: Path, model: Path, layout: Mapping[str, object], job: Path) -> tuple[list[Any], Statistics]:
    """Answers, and statistics merged over ranks."""
    engines = int(str(layout.get("data_parallel_size", 1)))
    steps: list[Mapping[str, object]] = [
        {"call": "reap_reset"},
        {"ask": prompts(engines)},
        {"settle": True},
        {"call": "reap_snapshot"},
        {"call": "reap_status"},
    ]
    _, answers, _, replies, statuses = run_engine(site, model, observing(layout), steps, job)
    assert [status["engine"] for status in statuses] == sorted(status["engine"] for status in statuses)
    assert all(status["failures"] == 0 for status in statuses)
    return answers, statistics_of(model, replies, engines)


def require_equal(found: Statistics, expected: Statistics) -> None:
    """Counts exactly, sums to 1e-5, whatever the order in which slices were seen."""
    order = [found.header.slices.index(name) for name in expected.header.slices]
    np.testing.assert_array_equal(found.layer_token_count_SPL[order], expected.layer_token_count_SPL)
    values = found.fields_by_name()
    for name, field in expected.fields_by_name().items():
        if "layer_token" in name:
            continue
        np.testing.assert_allclose(values[name][order], field, rtol=0 if "count" in name else 1e-5, err_msg=name)
    assert found.header.complete
    for name in ("requests", "prompt_tokens_total", "prompt_tokens_computed"):
        totals = [sum(getattr(window, name) for window in part.header.windows) for part in (found, expected)]
        assert totals[0] == totals[1], name


@pytest.fixture(scope="module")
def alone(site: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What one process answers and counts, by family; each is asked once."""
    job = tmp_path_factory.mktemp("alone") / "job.json"
    return functools.cache(lambda family: observed(site, models / family, {}, job))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_count_what_one_process_counts(
    family: str, layout: str, site: Path, models: Path, alone: Alone, tmp_path: Path
) -> None:
    answers, found = observed(site, models / family, LAYOUTS[layout], tmp_path / "job.json")
    expected_answers, expected = alone(family)
    assert [answer["token_ids"] for answer in answers] == [answer["token_ids"] for answer in expected_answers]
    require_equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_an_engine_without_observation(
    layout: str, site: Path, models: Path, tmp_path: Path
) -> None:
    """One request at a time: which requests share a step decides how its sums are rounded."""
    model, engines = models / "exaone_moe", int(str(LAYOUTS[layout].get("data_parallel_size", 1)))
    steps = [{"ask": prompts(engines)[:16], "together": False}]
    (plain,) = run_engine(site, model, LAYOUTS[layout], steps, tmp_path / "plain.json")
    (found,) = run_engine(site, model, observing(LAYOUTS[layout]), steps, tmp_path / "observed.json")
    assert found == plain
