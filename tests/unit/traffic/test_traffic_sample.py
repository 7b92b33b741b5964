"""Sampling and counting."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_serve.traffic.malformed import Malformed
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.sample import sample_traffic
from reap_serve.traffic.summary import SummaryTally
from reap_serve.traffic.tokens import CharacterCounter, Length

COUNTER = CharacterCounter()


def request(number: int, slice_name: str, tokens: int, session: str | None = None) -> Request:
    body = {"messages": [{"role": "user", "content": "x" * (4 * tokens)}]}
    return Request(
        body=body,
        kind="chat",
        slice=slice_name,
        origin=Origin("f", "requests", number),
        session=session,
        timestamp=number,
    )


def tokens_by_slice(requests: list[Request]) -> Counter[str]:
    found: Counter[str] = Counter()
    for item in requests:
        found[item.slice] += COUNTER(item).total_tokens
    return found


def test_proportional_sample_keeps_the_mix() -> None:
    traffic = [request(number, "a" if number % 4 else "b", 10) for number in range(400)]
    chosen = sample_traffic(traffic, tokens=1000, seed=3, counter=COUNTER)
    # 3,000 and 1,000 tokens in the traffic: quotas 750 and 250, in requests of 10.
    assert tokens_by_slice(chosen) == {"a": 750, "b": 250}
    assert [item.line for item in chosen] == sorted(item.line for item in chosen)
    assert chosen == sample_traffic(traffic, tokens=1000, seed=3, counter=COUNTER)
    assert chosen != sample_traffic(traffic, tokens=1000, seed=4, counter=COUNTER)


def test_equal_sample_gives_the_rest_to_larger_slices() -> None:
    traffic = [request(0, "small", 40)] + [request(number, "ab"[number % 2], 10) for number in range(1, 401)]
    chosen = sample_traffic(traffic, tokens=1000, seed=0, counter=COUNTER, allocation="equal")
    assert tokens_by_slice(chosen) == {"small": 40, "a": 480, "b": 480}


@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=60),
    tokens=st.integers(1, 500),
    seed=st.integers(0, 100),
)
def test_sample_reaches_but_barely_exceeds_its_quotas(sizes: list[tuple[str, int]], tokens: int, seed: int) -> None:
    traffic = [request(number, name, size) for number, (name, size) in enumerate(sizes)]
    total = sum(tokens_by_slice(traffic).values())
    chosen = sample_traffic(traffic, tokens=tokens, seed=seed, counter=COUNTER)
    assert {item.line for item in chosen} <= {item.line for item in traffic}
    assert len({item.line for item in chosen}) == len(chosen)
    wanted = min(tokens, total)
    taken = sum(tokens_by_slice(chosen).values())
    assert wanted - 1e-6 <= taken < wanted + 50 * 3 + 1


def test_every_request_is_equally_likely() -> None:
    traffic = [request(number, "a", 1) for number in range(20)]
    found: Counter[int] = Counter()
    for seed in range(2000):
        found.update(item.line for item in sample_traffic(traffic, tokens=5, seed=seed, counter=COUNTER))
    # Binomial(2000, 1/4): mean 500, standard deviation 19.4; six of them.
    assert len(found) == 20
    assert all(abs(count - 500) < 117 for count in found.values())


def test_character_estimate_counts_what_the_model_reads() -> None:
    asked = Request(
        body={"messages": [{"role": "user", "content": [{"type": "text", "text": "12345"}]}], "tools": [{"a": 1}]},
        kind="chat",
        slice="default",
        origin=Origin("f", "requests", 1),
        answer={"role": "assistant", "content": "1234", "reasoning": "5"},
    )
    # 5 + len('[{"a": 1}]') = 15 characters; 5 characters.
    assert COUNTER(asked) == Length(prompt_tokens=4, output_tokens=2)
    ids = Request(body={"prompt": [1, 2, 3]}, kind="completion", slice="default", origin=Origin("f", "requests", 1))
    assert COUNTER(ids) == Length(prompt_tokens=3, output_tokens=0)


def test_summary() -> None:
    tally = SummaryTally(COUNTER)
    for item in (request(5, "a", 3, "s1"), request(7, "b", 1, "s1"), request(6, "a", 2)):
        tally.add(item)
    malformed = Malformed()
    malformed.add("not JSON", "f:9")
    found = tally.summary(malformed)
    assert (found.requests, found.sessions, found.duration_seconds) == (3, 1, 2.0)
    assert found.slices["a"].prompt_tokens == 5
    assert found.formats == {"requests": 3}
    assert found.malformed == {"not JSON": 1}


def test_unbounded_sessions_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap_serve.traffic.summary.MAX_SESSIONS", 10)
    tally = SummaryTally(COUNTER)
    for number in range(20):
        tally.add(request(number, "a", 1, f"s{number}"))
    found = tally.summary(Malformed())
    assert (found.sessions, found.sessions_complete) == (10, False)
