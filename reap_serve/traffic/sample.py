"""A random sample of traffic with a given number of tokens, stratified by slice."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from reap_serve.traffic.request import Request
from reap_serve.traffic.tokens import TokenCounter

Allocation = Literal["proportional", "equal"]


@dataclass(slots=True)
class _Stratum:
    """The requests of one slice with the smallest random keys, as many as can be needed.

    A heap of (-key, order, tokens, request): its root has the largest key, and leaves first.
    """

    total_tokens: int = 0
    kept_tokens: int = 0
    heap: list[tuple[float, int, int, Request]] = field(default_factory=list)

    def add(self, key: float, order: int, tokens: int, request: Request, needed_tokens: int) -> None:
        self.total_tokens += tokens
        self.kept_tokens += tokens
        heapq.heappush(self.heap, (-key, order, tokens, request))
        while self.kept_tokens - self.heap[0][2] >= needed_tokens:
            self.kept_tokens -= heapq.heappop(self.heap)[2]


def sample_traffic(
    requests: Iterable[Request],
    *,
    tokens: int,
    seed: int,
    counter: TokenCounter,
    allocation: Allocation = "proportional",
) -> list[Request]:
    """A sample of `tokens` tokens, without replacement, in the order of the traffic.

    Every request gets a uniform random key from the seed; each slice gives the requests with its smallest keys, until
    its quota is reached. A slice therefore exceeds its quota by less than one request. Quotas:

        proportional: N · T_s / Σ T        (T_s = tokens of slice s in the traffic)
        equal:        min(T_s, level), with the level at which the quotas sum to N

    Memory holds at most `tokens` tokens and one request a slice.

    Args:
        requests: The traffic.
        tokens: Tokens wanted, prompts and answers together; traffic with fewer is taken whole.
        seed: Makes the same choice for the same traffic.
        counter: Measures the requests.
        allocation: How the tokens are shared among the slices.
    """
    generator = random.Random(seed)
    strata: dict[str, _Stratum] = {}
    for order, request in enumerate(requests):
        stratum = strata.setdefault(request.slice, _Stratum())
        stratum.add(generator.random(), order, counter(request).total_tokens, request, tokens)
    quotas = _quotas({name: stratum.total_tokens for name, stratum in strata.items()}, tokens, allocation)
    chosen: list[tuple[int, Request]] = []
    for name, stratum in strata.items():
        taken = 0.0
        for _, order, length, request in sorted(stratum.heap, key=lambda item: (-item[0], item[1])):
            if taken >= quotas[name]:
                break
            taken += length
            chosen.append((order, request))
    return [request for _, request in sorted(chosen, key=lambda item: item[0])]


def _quotas(total_tokens: dict[str, int], tokens: int, allocation: Allocation) -> dict[str, float]:
    if allocation == "proportional":
        whole = max(sum(total_tokens.values()), 1)
        return {name: tokens * total / whole for name, total in total_tokens.items()}
    quotas: dict[str, float] = {}
    left = float(tokens)
    # Smallest first: what a small slice cannot give is shared among the larger ones.
    for position, (name, total) in enumerate(sorted(total_tokens.items(), key=lambda item: (item[1], item[0]))):
        quotas[name] = min(float(total), left / (len(total_tokens) - position))
        left -= quotas[name]
    return quotas
