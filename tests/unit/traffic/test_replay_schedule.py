"""Schedules, filler text and the latency formulas."""

from __future__ import annotations

import pytest

from reap_serve.errors import RequestError, TrafficError
from reap_serve.traffic.filler import filler_body
from reap_serve.traffic.latency import Outcome, distribution, latency
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.schedule import Concurrency, Rate, Timed, start_times


def request(
    timestamp: float | None = None, source: str = "a", tokens: int = 0, blocks: tuple[int, ...] | None = None
) -> Request:
    return Request(
        body=None,
        kind="completion",
        slice="default",
        origin=Origin(source, "mooncake", 1),
        timestamp=timestamp,
        prompt_tokens=tokens,
        output_tokens=5,
        block_ids=blocks,
    )


def test_timed_starts_keep_distances_within_each_source() -> None:
    requests = [request(100.0), request(103.0), request(101.0), request(7.5, "b"), request(8.0, "b")]
    starts = start_times(requests, Timed(speedup=2.0))
    assert [(moment, item.timestamp) for moment, item in starts] == [
        (0.0, 100.0),
        (0.0, 7.5),
        (0.25, 8.0),
        (0.5, 101.0),
        (1.5, 103.0),
    ]


def test_timed_needs_timestamps() -> None:
    with pytest.raises(TrafficError, match="no timestamp"):
        start_times([request()], Timed())


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_rate_has_the_mean_and_variation_of_its_gamma_distribution(burstiness: float, variation: float) -> None:
    import numpy as np

    starts = start_times([request()] * 40_001, Rate(requests_per_second=50.0, burstiness=burstiness, seed=1))
    gaps = np.diff([moment for moment, _ in starts])
    assert starts[0][0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)
    assert starts == start_times([request()] * 40_001, Rate(50.0, burstiness, seed=1))


@pytest.mark.parametrize(
    "make", [lambda: Timed(0.0), lambda: Rate(-1.0), lambda: Rate(1.0, 0.0), lambda: Concurrency(0)]
)
def test_impossible_schedules_are_refused(make: object) -> None:
    with pytest.raises(RequestError):
        make()  # type: ignore[operator]


def test_filler_has_the_recorded_length_and_repeats_equal_blocks() -> None:
    first = filler_body(request(tokens=1040, blocks=(0, 1, 2)))
    second = filler_body(request(tokens=700, blocks=(0, 7)))
    words, other = str(first["prompt"]).split(" "), str(second["prompt"]).split(" ")
    assert (len(words), len(other)) == (1040, 700)
    assert words[:512] == other[:512]
    assert words[512:700] != other[512:700]
    assert (first["max_tokens"], first["ignore_eos"]) == (5, True)
    assert len(str(filler_body(request(tokens=30))["prompt"]).split(" ")) == 30


def outcome(*token_times: float, failure: str | None = None, output_tokens: int | None = None) -> Outcome:
    return Outcome(
        scheduled=1.0,
        started=1.0,
        token_times=token_times,
        prompt_tokens=3,
        output_tokens=len(token_times) if output_tokens is None else output_tokens,
        failure=failure,
    )


def test_latency_of_one_request_by_hand() -> None:
    one = outcome(1.5, 1.75, 2.5)
    assert (one.ttft_seconds, one.e2e_seconds, one.tpot_seconds) == (0.5, 1.5, 0.5)
    assert one.itl_seconds == [0.25, 0.75]
    # Two tokens came in one piece: the server's count decides.
    assert outcome(1.5, 2.5, output_tokens=3).tpot_seconds == 0.5
    assert outcome(1.5).tpot_seconds is None
    assert outcome().ttft_seconds is None


def test_latency_leaves_failures_out() -> None:
    found = latency([outcome(1.5, 2.0), outcome(2.0, 2.5), outcome(9.0, 99.0, failure="HTTP 500")])
    assert found.ttft is not None
    assert (found.ttft.mean, found.ttft.p50) == (0.75, 0.75)
    assert found.itl is not None
    assert found.itl.p99 == 0.5
    assert latency([]).e2e is None


def test_percentiles_interpolate() -> None:
    found = distribution([0.0, 1.0, 2.0, 3.0, 4.0])
    assert found is not None
    # Position of p90 among five values: 0.9 × 4 = 3.6.
    assert (found.mean, found.p50, found.p90, found.p99) == pytest.approx((2.0, 2.0, 3.6, 3.96))
