"""When the requests of a replay start: by a list of moments (open loop), or by the answers (closed loop)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from reap_serve.errors import RequestError, TrafficError
from reap_serve.traffic.request import Request


@dataclass(frozen=True, slots=True)
class Timed:
    """Requests start as they did when they were recorded.

        start_i = (timestamp_i - min over its source of timestamp) / speedup

    Attributes:
        speedup: 2.0 replays an hour in half an hour.
    """

    speedup: float = 1.0

    def __post_init__(self) -> None:
        if not self.speedup > 0:
            raise RequestError(f"speedup {self.speedup} is not above 0", "give a factor such as 2")


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests start in their order, at gamma-distributed distances.

        start_0 = 0,  start_i = start_{i-1} + Gamma(shape = burstiness, mean = 1 / requests_per_second)

    The coefficient of variation of the distances is 1/sqrt(burstiness): 1 gives a Poisson process, smaller values
    give bursts, larger ones regular arrivals. The definition is that of `vllm bench serve --burstiness`.

    Attributes:
        requests_per_second: Mean rate.
        burstiness: Shape of the distribution.
        seed: Makes the same schedule again.
    """

    requests_per_second: float
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.requests_per_second > 0:
            raise RequestError(f"rate {self.requests_per_second} is not above 0", "give requests per second")
        if not self.burstiness > 0:
            raise RequestError(f"burstiness {self.burstiness} is not above 0", "give 1 for Poisson arrivals")


@dataclass(frozen=True, slots=True)
class Concurrency:
    """A fixed number of requests is under way; each answer starts the next request.

    Attributes:
        requests: Number of requests under way.
    """

    requests: int

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise RequestError(f"concurrency {self.requests} is below 1", "give the number of requests under way")


Schedule = Timed | Rate | Concurrency


def start_times(requests: Sequence[Request], schedule: Timed | Rate) -> list[tuple[float, Request]]:
    """The moments at which requests start, in seconds from the start of the replay, ascending.

    Raises:
        TrafficError: The schedule is timed, and a request has no timestamp.
    """
    if isinstance(schedule, Rate):
        return _at_rate(requests, schedule)
    zero: dict[str, float] = {}
    stamped: list[tuple[float, Request]] = []
    for request in requests:
        if request.timestamp is None:
            raise TrafficError(
                f"{request.origin}: the request has no timestamp", "replay with --rate or --concurrency instead"
            )
        source = request.origin.source
        zero[source] = min(zero.get(source, request.timestamp), request.timestamp)
        stamped.append((request.timestamp, request))
    starts = [((timestamp - zero[item.origin.source]) / schedule.speedup, item) for timestamp, item in stamped]
    return sorted(starts, key=lambda start: start[0])


def _at_rate(requests: Sequence[Request], schedule: Rate) -> list[tuple[float, Request]]:
    generator = random.Random(schedule.seed)
    scale = 1.0 / (schedule.requests_per_second * schedule.burstiness)
    starts: list[tuple[float, Request]] = []
    moment = 0.0
    for request in requests:
        starts.append((moment, request))
        moment += generator.gammavariate(schedule.burstiness, scale)
    return starts
