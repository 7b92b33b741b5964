"""What drives the load and what memory the models get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap_serve.compare.latency import latency_report
from reap_serve.compare.record import MemoryBudget
from reap_serve.compare.side import kv_cache_bytes, open_side
from reap_serve.compare.vllm_bench import read_outcomes
from reap_serve.errors import EngineError, RequestError
from reap_serve.records import read_json_object
from reap_serve.serve.process import engine_environment
from reap_serve.traffic.replay import ReplayResult

# As `vllm bench serve --save-result --save-detailed` of vLLM 0.32 writes it, cut to what is read.
DETAILED = {
    "date": "20261101-101112",
    "duration": 4.0,
    "completed": 2,
    "failed": 1,
    "input_lens": [7, 9, 5],
    "output_lens": [3, 1, 0],
    "ttfts": [0.5, 0.25, 0.0],
    "itls": [[0.1, 0.3], [], []],
    "start_times": [101.0, 100.0, 102.0],
    "generated_texts": ["a b c", "a", ""],
    "errors": ["", "", "Traceback\nHTTPError: a prompt of the traffic"],
}


def test_the_times_of_vllm_bench_become_outcomes(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(DETAILED))
    outcomes, seconds = read_outcomes(read_json_object(tmp_path / "result.json"))
    second, first, third = outcomes[1], outcomes[0], outcomes[2]
    assert seconds == 4.0
    assert (first.started, first.ttft_seconds, first.tpot_seconds) == (0.0, 0.25, None)
    assert second.token_times == pytest.approx((1.5, 1.6, 1.9))
    # (E2E 0.9 - TTFT 0.5) / 2
    assert second.tpot_seconds == pytest.approx(0.2)
    assert (third.failure, third.token_times, third.output_tokens) == ("HTTPError", (), 0)
    from datetime import UTC, datetime

    report = latency_report(ReplayResult(outcomes, datetime.now(UTC), seconds), 2, {"ttft": 0.3})
    assert (report.requests, report.failed, report.output_tokens_per_second) == (3, 1, 1.0)
    assert report.goodput_requests_per_second == 0.25


def test_a_result_of_another_form_is_refused() -> None:
    for wrong in ({}, DETAILED | {"ttfts": [0.5]}, DETAILED | {"itls": 3}, DETAILED | {"duration": None}):
        with pytest.raises(EngineError, match="another form"):
            read_outcomes(wrong)  # type: ignore[arg-type]


def test_what_a_budget_leaves_for_the_kv_cache() -> None:
    memory, cache = (MemoryBudget(same=same, size_bytes=1000) for same in ("memory", "kv_cache"))
    assert [kv_cache_bytes(memory, weights, "m") for weights in (400, 250)] == [600, 750]
    assert [kv_cache_bytes(cache, weights, "m") for weights in (400, 250)] == [1000, 1000]
    with pytest.raises(RequestError, match="the weights of m take 1000 bytes of a budget of 1000"):
        kv_cache_bytes(memory, 1000, "m")
    with pytest.raises(RequestError, match="has its memory already"), open_side("http://x", budget=memory):
        pass


def test_an_option_for_the_kv_cache_is_not_overridden_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert engine_environment([])["VLLM_CPU_KVCACHE_SPACE"] == "7"
    for arguments in (["--kv-cache-memory-bytes", "5"], ["--kv-cache-memory-bytes=5"]):
        assert "VLLM_CPU_KVCACHE_SPACE" not in engine_environment(arguments)
