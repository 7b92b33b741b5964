"""A comparison from end to end, over two endpoints that run already."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_traffic import CALLED, WEATHER, chat
from stub_endpoint import StubEndpoint, bigram_model

from reap_serve.compare.latency import meets, parse_objectives
from reap_serve.compare.measure import CompareSettings
from reap_serve.compare.record import Report
from reap_serve.compare.run import compare
from reap_serve.compare.thresholds import failures, parse_thresholds
from reap_serve.compare.write import write_report
from reap_serve.errors import EngineError, MismatchError, OutputExistsError, RequestError
from reap_serve.traffic.latency import Outcome

QUIET = CompareSettings(latency_requests=0, answers_per_slice=3)
REQUESTS = [
    *[chat(f"question {number}", "an answer of some length " * 3, "prose") for number in range(12)],
    *[chat(f"call {number}", CALLED | {"content": "x y z"}, "tools", tools=[WEATHER]) for number in range(6)],
]


def run(base: StubEndpoint, candidate: StubEndpoint, settings: CompareSettings = QUIET) -> Report:
    with base, candidate:
        return compare(base.url, candidate.url, REQUESTS, settings).report


def test_a_model_against_itself_is_the_noise_floor_and_nothing_else() -> None:
    report = run(StubEndpoint(bigram_model(1)), StubEndpoint(bigram_model(1)))
    for entry in report.slices.values():
        assert entry.quality.kl_divergence_max == 0.0
        assert entry.quality.perplexity_ratio == 1.0
        assert entry.quality.same_answer_fraction == 1.0
        assert entry.noise_floor is not None
        assert entry.noise_floor == entry.quality


def test_divergence_is_measured_on_the_answers_and_their_end() -> None:
    base, other = bigram_model(1), bigram_model(1, noise=0.7)
    report = run(StubEndpoint(base), StubEndpoint(other))
    answer = "an answer of some length " * 3
    tokens = [ord(character) for character in f":{answer}"] + [3]
    log_p, log_q = base[tokens[:-1]], other[tokens[:-1]]
    whole = float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())
    prose = report.slices["prose"].quality
    assert prose.tokens == 12 * (len(answer) + 1)
    assert 0.8 * whole < prose.kl_divergence_mean <= whole
    loss = -base[tokens[:-1], tokens[1:]].mean()
    assert prose.perplexity_base == pytest.approx(np.exp(loss), rel=1e-6)
    noise = report.slices["prose"].noise_floor
    assert noise is not None
    assert noise.kl_divergence_max == 0.0


def test_planted_loops_are_found_in_their_slice() -> None:
    def loops_on_questions(prompt: str) -> str:
        return "ab" * 40 if "question" in prompt else "done"

    report = run(
        StubEndpoint(bigram_model(1), answer=lambda prompt: "fine"),
        StubEndpoint(bigram_model(1), answer=loops_on_questions, finish_reason="length"),
    )
    prose, tools = report.slices["prose"].quality, report.slices["tools"].quality
    assert (prose.loop_fraction_base, prose.loop_fraction_candidate) == (0.0, 1.0)
    assert tools.loop_fraction_candidate == 0.0
    assert prose.kl_divergence_max == 0.0


def test_broken_tool_calls_are_found_with_and_without_a_parser() -> None:
    good = '<tool_call>{"name": "get_weather", "arguments": {"city": "Ulm"}}</tool_call>'
    parsed = [{"function": {"name": "get_weather", "arguments": '{"city": 1}'}}]
    report = run(
        StubEndpoint(bigram_model(1), answer=lambda prompt: good),
        StubEndpoint(bigram_model(1), answer=lambda prompt: good, tool_parser=True, tool_calls=parsed),
    )
    tools = report.slices["tools"].quality
    assert (tools.tool_answers, tools.tool_call_valid_fraction_base, tools.tool_call_valid_fraction_candidate) == (
        3,
        1,
        0,
    )
    assert report.slices["prose"].quality.tool_answers == 0


def test_requests_too_long_are_left_out_and_counted() -> None:
    long = chat("long", "y" * 300, "prose")
    with StubEndpoint(bigram_model(1), max_model_len=200) as base, StubEndpoint(bigram_model(1)) as candidate:
        report = compare(base.url, candidate.url, [*REQUESTS, long], QUIET).report
        assert (report.too_long, report.slices["prose"].quality.requests) == (1, 12)
        with pytest.raises(RequestError, match="none of 1 requests fits 200 tokens"):
            compare(base.url, candidate.url, [long], QUIET)


def test_a_candidate_of_shorter_sequences_is_refused() -> None:
    with pytest.raises(MismatchError, match="takes sequences of 50 tokens"):
        run(StubEndpoint(bigram_model(1)), StubEndpoint(bigram_model(1), max_model_len=50))


def test_another_tokenizer_is_refused() -> None:
    class Shifted(StubEndpoint):
        def tokenize(self, body: dict[str, object]) -> list[int]:
            return [token + 1 for token in super().tokenize(body)]

    with pytest.raises(MismatchError, match="different tokens"):
        run(StubEndpoint(bigram_model(1)), Shifted(bigram_model(1)))


def test_urls_are_asked_before_the_base_is_measured() -> None:
    with StubEndpoint(bigram_model(1)) as gone:
        silent = gone.url
    with StubEndpoint(bigram_model(1)) as base:
        for candidates in ((silent,), (base.url, silent)):
            with pytest.raises(EngineError, match=f"{silent}/v1/models does not answer: ConnectError"):
                compare(base.url, candidates[0], [chat("q", "a", "prose")], QUIET, others=candidates[1:])
        assert {path for path, _ in base.seen} == {"/v1/models"}


def test_an_engine_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="HTTP 500"):
        run(StubEndpoint(bigram_model(1)), StubEndpoint(bigram_model(1), fail_paths=("/v1/completions",)))
    assert list(tmp_path.iterdir()) == []


def test_latency_at_several_concurrencies_with_goodput(tmp_path: Path) -> None:
    settings = CompareSettings(
        latency_requests=6, answers_per_slice=0, concurrency=(1, 3), objectives={"ttft": 30.0}, noise_floor=False
    )
    with StubEndpoint(bigram_model(1)) as base, StubEndpoint(bigram_model(1)) as candidate:
        comparison = compare(base.url, candidate.url, REQUESTS, settings)
        streamed = [body for path, body in base.seen if body.get("stream")]
    report = comparison.report
    assert [level.concurrency for level in report.latency.levels] == [1, 3]
    first = report.latency.base
    assert first is not None
    assert first == report.latency.levels[0].base
    assert (first.requests, first.failed) == (6, 0)
    assert first.goodput_requests_per_second == pytest.approx(6 / first.seconds)
    # A server without a parser of tool calls would refuse tools that the model may choose.
    assert {body.get("tool_choice") for body in streamed if "tools" in body} == {"none"}
    assert report.slices["prose"].noise_floor is None

    written = write_report(report, tmp_path / "out", overwrite=False, replays=comparison.replays)
    names = {path.name for path in written}
    assert {"report.json", "latency-base-1.json", "latency-base-3.json", "latency-candidate-3.json"} <= names
    assert Report.model_validate_json((tmp_path / "out" / "report.json").read_text()) == report
    exported = json.loads((tmp_path / "out" / "latency-base-3.json").read_text())
    assert exported["version"] == "0.2.1"
    with pytest.raises(OutputExistsError):
        write_report(report, tmp_path / "out", overwrite=False)


def test_no_text_and_no_token_reaches_the_report() -> None:
    report = run(StubEndpoint(bigram_model(1), answer=lambda prompt: "zyzzyva"), StubEndpoint(bigram_model(2)))
    text = report.model_dump_json()
    assert "zyzzyva" not in text
    assert "some length" not in text


def test_objectives() -> None:
    assert parse_objectives(["ttft:500", "tpot:50"]) == {"ttft": 0.5, "tpot": 0.05}
    for wrong in ("ttft", "ttft:", "ttft:0", "ttft:nan", "speed:1"):
        with pytest.raises(RequestError, match="NAME:MILLISECONDS"):
            parse_objectives([wrong])
    outcome = Outcome(0.0, 1.0, [1.4, 1.6, 1.8], 5, 3, None)
    assert meets(outcome, {"ttft": 0.4 + 1e-9, "tpot": 0.2 + 1e-9})
    assert not meets(outcome, {"ttft": 0.3})
    assert not meets(Outcome(0.0, 1.0, [], None, 0, "HTTP 500"), {})


def test_a_gate_over_every_slice() -> None:
    report = run(StubEndpoint(bigram_model(1)), StubEndpoint(bigram_model(1, noise=0.7)))
    gates = parse_thresholds(
        ["slices.*.quality.kl_divergence_mean>0.01", "slices.tools.quality.tokens<1"], report.slices
    )
    failed = failures(gates, report)
    assert len(failed) == 2
    assert failed[0].startswith("slices.prose.quality.kl_divergence_mean is 0.")
