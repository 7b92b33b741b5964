"""Latency and throughput of one endpoint in a closed loop, at several concurrencies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from reap_serve.compare.record import LatencyReport
from reap_serve.errors import RequestError
from reap_serve.traffic.benchmark_report import REPLAY_TOOL
from reap_serve.traffic.endpoint import ClientSettings
from reap_serve.traffic.latency import Outcome
from reap_serve.traffic.replay import ReplayResult
from reap_serve.traffic.replay import replay as send_all
from reap_serve.traffic.request import Request
from reap_serve.traffic.schedule import Concurrency

# Names as in `vllm bench serve --goodput`, which takes milliseconds too.
_OBJECTIVES = {"ttft": "ttft_seconds", "tpot": "tpot_seconds", "e2el": "e2e_seconds"}


@dataclass(frozen=True, slots=True)
class Replayed:
    """One closed loop, with all that an export of it needs."""

    report: LatencyReport
    result: ReplayResult
    requests: Sequence[Request]
    settings: ClientSettings
    schedule: Concurrency
    tool: tuple[str, str] = REPLAY_TOOL


def parse_objectives(texts: Sequence[str]) -> dict[str, float]:
    """Objectives such as `ttft:500`, in milliseconds, as seconds by name.

    Raises:
        RequestError: A name is not known, or a number is not above 0.
    """
    objectives: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition(":")
        try:
            milliseconds = float(number)
        except ValueError:
            milliseconds = 0.0
        if name not in _OBJECTIVES or not milliseconds > 0:
            raise RequestError(
                f"--goodput {text} is not NAME:MILLISECONDS", f"names are {', '.join(_OBJECTIVES)}; such as ttft:500"
            )
        objectives[name] = milliseconds / 1000.0
    return objectives


def run_closed_loop(
    requests: Sequence[Request], settings: ClientSettings, concurrency: int, objectives: Mapping[str, float]
) -> Replayed:
    """Sends requests with a number of them under way, and times the streamed answers.

    Tools are offered as recorded but with `tool_choice` "none" where the model was free to choose: the prompt is the
    same, and a server without a parser of tool calls does not refuse it.

    Raises:
        EngineError: The endpoint does not answer at all.
    """
    sent = [_without_parsing(request) for request in requests]
    schedule = Concurrency(concurrency)
    result = asyncio.run(send_all(sent, settings, schedule))
    return Replayed(latency_report(result, concurrency, objectives), result, sent, settings, schedule)


def latency_report(result: ReplayResult, concurrency: int, objectives: Mapping[str, float]) -> LatencyReport:
    """The figures of a closed loop."""
    summary = result.summary()
    met = sum(meets(outcome, objectives) for outcome in result.outcomes)
    return LatencyReport(
        concurrency=concurrency,
        requests=summary.requests,
        failed=summary.failed,
        seconds=summary.seconds,
        output_tokens_per_second=summary.output_tokens / summary.seconds if summary.seconds else 0.0,
        goodput_requests_per_second=met / summary.seconds if objectives and summary.seconds else None,
        latency=summary.latency,
    )


def meets(outcome: Outcome, objectives: Mapping[str, float]) -> bool:
    """Whether a request succeeded within every objective; one without a second token has no TPOT to exceed."""
    if outcome.failure is not None:
        return False
    times = ((getattr(outcome, _OBJECTIVES[name]), limit) for name, limit in objectives.items())
    return all(seconds is None or seconds <= limit for seconds, limit in times)


def _without_parsing(request: Request) -> Request:
    body = request.body
    if body is None or not body.get("tools") or body.get("tool_choice", "auto") not in (None, "auto"):
        return request
    return replace(request, body={**body, "tool_choice": "none"})
