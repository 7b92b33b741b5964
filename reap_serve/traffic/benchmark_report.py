"""A replay as a Benchmark Report 0.2.1 of llm-d, which dashboards of several load generators read.

Schema: https://github.com/llm-d/llm-d-benchmark (benchmark report), released as `llmd-benchmark-report` on PyPI. The
fields below are those of its release 0.2.1; the tests validate what is written with that package where it is
installed. It is no dependency: only this one document of it is needed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from reap_serve import __version__
from reap_serve.publish import write_file
from reap_serve.records import JsonValue
from reap_serve.traffic.endpoint import ClientSettings
from reap_serve.traffic.latency import Outcome
from reap_serve.traffic.replay import ReplayResult
from reap_serve.traffic.request import Request
from reap_serve.traffic.schedule import Concurrency, Rate, Schedule, Timed

REPLAY_TOOL = ("reap-serve replay", __version__)
_PERCENTILES = {"p1": 1, "p5": 5, "p10": 10, "p25": 25, "p50": 50, "p75": 75, "p90": 90, "p95": 95, "p99": 99}


def write_report(
    result: ReplayResult,
    requests: Sequence[Request],
    settings: ClientSettings,
    schedule: Schedule,
    path: Path,
    *,
    overwrite: bool,
    tool: tuple[str, str] = REPLAY_TOOL,
) -> None:
    """Writes the report of a replay as JSON; it holds no text of the traffic, and no key.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        StorageError: The disk refused.
    """
    document = benchmark_report(result, requests, settings, schedule, tool)
    write_file(path, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n", overwrite=overwrite)


def benchmark_report(
    result: ReplayResult,
    requests: Sequence[Request],
    settings: ClientSettings,
    schedule: Schedule,
    tool: tuple[str, str] = REPLAY_TOOL,
) -> dict[str, JsonValue]:
    """The report of a replay, as a JSON object; `tool` is the name and version of what sent the requests."""
    end = result.began + timedelta(seconds=result.seconds)
    return {
        "version": "0.2.1",
        "run": {
            "uid": uuid.uuid4().hex,
            "time": {
                "start": result.began.isoformat(),
                "end": end.isoformat(),
                "duration": f"PT{result.seconds:.6f}S",
            },
        },
        "scenario": {"load": _load(result, requests, settings, schedule, tool)},
        "results": {"request_performance": {"aggregate": _aggregate(result)}},
    }


def _load(
    result: ReplayResult,
    requests: Sequence[Request],
    settings: ClientSettings,
    schedule: Schedule,
    tool: tuple[str, str],
) -> dict[str, JsonValue]:
    lengths = [outcome.prompt_tokens for outcome in result.outcomes if outcome.prompt_tokens is not None]
    has_text = all(request.has_text for request in requests)
    standardized: dict[str, JsonValue] = {
        "tool": tool[0],
        "tool_version": tool[1],
        "source": "sampled" if has_text else "random",
        "input_seq_len": {
            "distribution": "other",
            "value": sum(lengths) / len(lengths) if lengths else 0,
            **({"min": min(lengths), "max": max(max(lengths), 1)} if lengths else {}),
        },
    }
    arguments: dict[str, JsonValue] = {"url": settings.url, "model": settings.model, "retries": settings.max_retries}
    match schedule:
        case Rate():
            standardized["rate_qps"] = schedule.requests_per_second
            arguments |= {"rate": schedule.requests_per_second, "burstiness": schedule.burstiness}
        case Timed():
            arguments |= {"timed": True, "speedup": schedule.speedup}
        case Concurrency():
            standardized["concurrency"] = schedule.requests
            arguments |= {"concurrency": schedule.requests}
    return {"metadata": {}, "standardized": standardized, "native": {"args": arguments}}


def _aggregate(result: ReplayResult) -> dict[str, JsonValue]:
    good = [outcome for outcome in result.outcomes if outcome.failure is None]
    prompts = [float(outcome.prompt_tokens) for outcome in good if outcome.prompt_tokens is not None]
    outputs = [float(outcome.output_tokens) for outcome in good]
    seconds = result.seconds
    return _without_absent(
        {
            "requests": _without_absent(
                {
                    "total": len(result.outcomes),
                    "failures": len(result.outcomes) - len(good),
                    "input_length": _statistics(prompts, "count"),
                    "output_length": _statistics(outputs, "count"),
                }
            ),
            "latency": _latency(good),
            "throughput": {
                "input_token_rate": {"units": "tokens/s", "mean": sum(prompts) / seconds},
                "output_token_rate": {"units": "tokens/s", "mean": sum(outputs) / seconds},
                "total_token_rate": {"units": "tokens/s", "mean": (sum(prompts) + sum(outputs)) / seconds},
                "request_rate": {"units": "queries/s", "mean": len(good) / seconds},
            },
        }
    )


def _latency(good: Sequence[Outcome]) -> dict[str, JsonValue]:
    def each(name: str) -> list[float]:
        return [value for outcome in good if (value := getattr(outcome, name)) is not None]

    per_output_token = [outcome.token_times[-1] - outcome.started for outcome in good if outcome.token_times]
    counts = [max(outcome.output_tokens, 1) for outcome in good if outcome.token_times]
    normalized = [time / count for time, count in zip(per_output_token, counts, strict=True)]
    gaps = [gap for outcome in good for gap in outcome.itl_seconds]
    return _without_absent(
        {
            "time_to_first_token": _statistics(each("ttft_seconds"), "s"),
            "normalized_time_per_output_token": _statistics(normalized, "s/token"),
            "time_per_output_token": _statistics(each("tpot_seconds"), "s/token"),
            "inter_token_latency": _statistics(gaps, "s/token"),
            "request_latency": _statistics(each("e2e_seconds"), "s"),
        }
    )


def _statistics(values: Sequence[float], units: str) -> dict[str, JsonValue] | None:
    import numpy as np

    if not values:
        return None
    found = np.percentile(values, list(_PERCENTILES.values()))
    percentiles = {name: float(value) for name, value in zip(_PERCENTILES, found, strict=True)}
    return {
        "units": units,
        "mean": float(np.mean(values)),
        "stddev": float(np.std(values)),
        "min": float(min(values)),
        **percentiles,
        "max": float(max(values)),
    }


def _without_absent(document: dict[str, JsonValue]) -> dict[str, JsonValue]:
    return {key: value for key, value in document.items() if value is not None}
