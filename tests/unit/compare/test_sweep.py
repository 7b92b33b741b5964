"""Several plans in one engine, and several candidates side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_traffic import chat
from stub_endpoint import StubEndpoint, bigram_model

from reap_serve.compare.candidate_figures import pareto_front
from reap_serve.compare.measure import CompareSettings
from reap_serve.compare.record import CandidateReport
from reap_serve.compare.run import compare
from reap_serve.compare.sweep import read_plans, sweep
from reap_serve.errors import EngineError, RequestError
from reap_serve.plan.record import Plan, PlanLayer, Unbound

QUIET = CompareSettings(latency_requests=0, answers_per_slice=2)
REQUESTS = [chat(f"question {number}", "an answer of some length", "prose") for number in range(8)]


def plan(kept: tuple[int, ...]) -> Plan:
    layer = PlanLayer(layer="l", index=0, kept=kept, dropped=tuple(set(range(4)) - set(kept)))
    return Plan(schema_version=1, model=Unbound(), criterion="by hand", layers=(layer,))


def masked() -> StubEndpoint:
    """A full model, and what it says with three and with two of its four experts."""
    return StubEndpoint(
        bigram_model(1), masks={(0, 1, 2): bigram_model(1, noise=0.2), (0, 1): bigram_model(1, noise=1.0)}
    )


def test_a_sweep_gives_what_the_checkpoints_would_give() -> None:
    plans = {"three": plan((0, 1, 2)), "two": plan((0, 1))}
    with masked() as endpoint:
        found = sweep(endpoint.url, plans, REQUESTS, QUIET).report
        assert endpoint.loaded == {}
    with (
        StubEndpoint(bigram_model(1)) as base,
        StubEndpoint(bigram_model(1, noise=0.2)) as three,
        StubEndpoint(bigram_model(1, noise=1.0)) as two,
    ):
        served = compare(base.url, three.url, REQUESTS, QUIET, others=(two.url,)).report
    assert found.candidate == "three"
    assert found.slices == served.slices
    assert [entry.name for entry in found.candidates] == ["three", "two"]
    assert [entry.slices for entry in found.candidates] == [entry.slices for entry in served.candidates]
    assert [entry.experts_kept for entry in found.candidates] == [3, 2]
    assert all(entry.virtual for entry in found.candidates)
    one, other = (entry.slices["prose"].kl_divergence_mean for entry in found.candidates)
    assert 0.0 < one < other
    # The engine's own figures are those of the full model.
    assert found.latency.base is None
    assert found.memory.candidate.kv_cache_tokens is None


def test_a_default_plan_of_the_server_does_not_stand_in_for_the_base() -> None:
    with masked() as endpoint:
        sweep(endpoint.url, {"two": plan((0, 1))}, REQUESTS, QUIET)
        asked = [body["vllm_xargs"]["reap_plan"] for path, body in endpoint.seen if path == "/v1/completions"]
    # 8 scores and 2 answers, the base twice.
    assert asked == ["base"] * 20 + ["compare-two"] * 10


def test_the_engine_is_told_where_a_recorded_answer_begins() -> None:
    with masked() as endpoint:
        sweep(endpoint.url, {"two": plan((0, 1))}, REQUESTS, QUIET, answer_only=("two",))
        loaded = [body["phase"] for path, body in endpoint.seen if path == "/v1/reap/mask"]
        scored = [body for _, body in endpoint.seen if "prompt_logprobs" in body]
    assert loaded == ["decode"]
    assert len(scored) == 8 * 3
    for body in scored:
        begin = body["vllm_xargs"]["reap_prompt_tokens"]
        text = "".join(map(chr, body["prompt"][begin:]))
        assert text.startswith("an answer of some length")


def test_an_endpoint_that_takes_no_plans_or_refuses_one() -> None:
    with (
        StubEndpoint(bigram_model(1)) as endpoint,
        pytest.raises(EngineError, match="takes no plans; start it by `reap-serve serve`"),
    ):
        sweep(endpoint.url, {"two": plan((0, 1))}, REQUESTS, QUIET)
    with masked() as endpoint, pytest.raises(EngineError, match="refuses the plan compare-one: the plan keeps too few"):
        sweep(endpoint.url, {"one": plan((0,))}, REQUESTS, QUIET)


def test_plans_go_by_their_files_names(tmp_path: Path) -> None:
    for name in ("half of it.json", "three.json"):
        (tmp_path / name).write_text(plan((0, 1)).model_dump_json())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "three.json").write_text(plan((0, 1)).model_dump_json())
    assert list(read_plans([tmp_path / "half of it.json", tmp_path / "three.json"])) == ["half-of-it", "three"]
    with pytest.raises(RequestError, match="two plans are called three"):
        read_plans([tmp_path / "three.json", tmp_path / "sub" / "three.json"])


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    def candidate(name: str, size: int | None, divergence: float) -> CandidateReport:
        from small_report import small_quality

        worst, best = small_quality(1.0), small_quality(0.001)
        worst = worst.model_copy(update={"kl_divergence_mean": divergence})
        return CandidateReport(
            name=name, virtual=True, experts_kept=None, weights_bytes=size, slices={"a": best, "b": worst}
        )

    found = pareto_front(
        [
            candidate("small and bad", 10, 0.9),
            candidate("large and good", 30, 0.1),
            candidate("beaten", 30, 0.2),
            candidate("between", 20, 0.5),
            candidate("of no size", None, 0.0),
        ]
    )
    assert found == {"small and bad", "large and good", "between"}
