"""Recorded requests sent to a live endpoint, on a schedule, each one timed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from reap_serve.records import Record
from reap_serve.traffic.endpoint import ClientSettings, Endpoint
from reap_serve.traffic.latency import Distribution, Latency, Outcome, distribution, latency
from reap_serve.traffic.request import Request
from reap_serve.traffic.schedule import Concurrency, Schedule, start_times

# The event loop's timer may be late by its clock's resolution and by what else runs; the last stretch is spun.
_SPIN_SECONDS = 0.002


class ReplaySummary(Record):
    """What `replay --json` prints.

    Attributes:
        requests: Requests sent.
        failed: Those without a whole answer.
        failures: Number of failures by reason.
        seconds: From the first start to the last answer.
        prompt_tokens: As the server counted them, over the requests that succeeded.
        output_tokens: Likewise.
        latency: Over the requests that succeeded.
        start_delay: Start - scheduled start of all requests; zero in a closed loop.
    """

    requests: int
    failed: int
    failures: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    latency: Latency
    start_delay: Distribution | None


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """A finished replay.

    Attributes:
        outcomes: One a request, in the order of their starts.
        began: UTC time of the start.
        seconds: From the first start to the last answer.
    """

    outcomes: tuple[Outcome, ...]
    began: datetime
    seconds: float

    def summary(self) -> ReplaySummary:
        """Counts and distributions over the outcomes."""
        good = [outcome for outcome in self.outcomes if outcome.failure is None]
        failures = Counter(outcome.failure for outcome in self.outcomes if outcome.failure is not None)
        return ReplaySummary(
            requests=len(self.outcomes),
            failed=len(self.outcomes) - len(good),
            failures=dict(failures),
            seconds=self.seconds,
            prompt_tokens=sum(outcome.prompt_tokens or 0 for outcome in good),
            output_tokens=sum(outcome.output_tokens for outcome in good),
            latency=latency(self.outcomes),
            start_delay=distribution([outcome.started - outcome.scheduled for outcome in self.outcomes]),
        )


async def replay(
    requests: Sequence[Request],
    settings: ClientSettings,
    schedule: Schedule,
    *,
    on_answer: Callable[[Outcome], None] | None = None,
) -> ReplayResult:
    """Sends requests to an endpoint and waits for all answers.

    Failures of single requests are outcomes, not errors.

    Args:
        requests: What to send; a request without text is sent as filler text of its length.
        settings: How to call the endpoint.
        schedule: When requests start.
        on_answer: Called with each outcome as it ends.

    Raises:
        EngineError: The endpoint does not answer at all.
        TrafficError: The schedule needs timestamps, and a request has none.
        RequestError: It is not clear which model to ask for.
    """
    starts = None if isinstance(schedule, Concurrency) else start_times(requests, schedule)
    async with Endpoint(settings) as endpoint:
        if requests:
            endpoint.body(requests[0])
        began, zero = datetime.now(UTC), time.perf_counter()
        report = on_answer or (lambda outcome: None)
        if isinstance(schedule, Concurrency):
            outcomes = await _closed_loop(endpoint, requests, schedule.requests, zero, report)
        else:
            outcomes = await _open_loop(endpoint, starts or [], zero, report)
        seconds = time.perf_counter() - zero
    return ReplayResult(outcomes=tuple(sorted(outcomes, key=_start)), began=began, seconds=seconds)


def _start(outcome: Outcome) -> float:
    return outcome.started


async def _open_loop(
    endpoint: Endpoint,
    starts: Sequence[tuple[float, Request]],
    zero: float,
    report: Callable[[Outcome], None],
) -> list[Outcome]:
    """Starts each request at its moment, whether or not those before it were answered."""

    async def send(request: Request, scheduled: float) -> Outcome:
        outcome = await endpoint.send(request, scheduled, zero)
        report(outcome)
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Outcome]] = []
        for scheduled, request in starts:
            await _sleep_until(zero + scheduled)
            tasks.append(group.create_task(send(request, scheduled)))
    return [task.result() for task in tasks]


async def _closed_loop(
    endpoint: Endpoint,
    requests: Sequence[Request],
    concurrency: int,
    zero: float,
    report: Callable[[Outcome], None],
) -> list[Outcome]:
    """Keeps a number of requests under way."""
    waiting = iter(requests)
    outcomes: list[Outcome] = []

    async def work() -> None:
        for request in waiting:
            outcome = await endpoint.send(request, None, zero)
            outcomes.append(outcome)
            report(outcome)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(work())
    return outcomes


async def _sleep_until(moment: float) -> None:
    """Waits for a moment on `time.perf_counter`; returns at once, after one turn of the loop, when it has passed."""
    left = moment - time.perf_counter()
    await asyncio.sleep(max(left - _SPIN_SECONDS, 0.0))
    while time.perf_counter() < moment:
        await asyncio.sleep(0)
