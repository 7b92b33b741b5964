"""`reap-serve replay`: recorded requests against a running endpoint."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import keep_stdout_for, print_json, progress_bar, stdout
from reap_serve.cli.traffic_options import (
    FormatName,
    Json,
    Overwrite,
    SkipMalformed,
    SliceFiles,
    TrafficFiles,
    named_files,
    open_traffic,
)
from reap_serve.cli.traffic_tables import note_skipped
from reap_serve.errors import EngineError, RequestError

if TYPE_CHECKING:
    from reap_serve.traffic.endpoint import ClientSettings
    from reap_serve.traffic.replay import ReplayResult, ReplaySummary
    from reap_serve.traffic.request import Request
    from reap_serve.traffic.schedule import Schedule


@app.command("replay")
def replay_command(
    url: Annotated[str, typer.Option(help="OpenAI endpoint, such as http://127.0.0.1:8000.")],
    files: TrafficFiles = None,
    slices: SliceFiles = None,
    format: FormatName = None,
    skip_malformed: SkipMalformed = False,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the API key.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for; recorded or only one by default.")] = None,
    rate: Annotated[float | None, typer.Option(help="Start this many requests per second.")] = None,
    burstiness: Annotated[
        float | None, typer.Option(help="Shape of the gamma-distributed arrivals of --rate; 1 is Poisson.")
    ] = None,
    timed: Annotated[bool, typer.Option("--timed", help="Start requests as their timestamps say.")] = False,
    speedup: Annotated[float | None, typer.Option(help="Divide the distances of --timed by this.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Keep this many requests under way (1 without --rate and --timed).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Send only the first requests.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer to ask for.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer to begin or go on.")] = 600.0,
    retries: Annotated[int, typer.Option(min=0, help="Repeat a failed request; 0 shows every failure.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the arrivals of --rate.")] = 0,
    tag_slices: Annotated[
        bool, typer.Option("--tag-slices", help="Tell the server each request's slice (vllm_xargs.reap_slice).")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write a report in the form of llm-d's Benchmark Report 0.2.1 (JSON).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Send recorded requests to an endpoint and measure the answers."""
    from itertools import islice

    from reap_serve.file_kinds import REPLAY_REPORT
    from reap_serve.publish import refuse_existing
    from reap_serve.traffic.benchmark_report import write_report
    from reap_serve.traffic.endpoint import ClientSettings, require_url

    require_url(url)
    schedule = _schedule(rate, burstiness, timed, speedup, concurrency, seed)
    if report is not None:
        keep_stdout_for(report)
        refuse_existing(report, overwrite, REPLAY_REPORT, named_files(files, slices))
    requests, malformed = open_traffic(files, slices, format, skip_malformed, require_text=False, keep_templates=True)
    settings = ClientSettings(
        url=url,
        api_key=_api_key(api_key_env),
        model=model,
        timeout_seconds=timeout,
        max_retries=retries,
        tag_slices=tag_slices,
        max_output_tokens=max_output_tokens,
    )
    chosen = list(islice(requests, limit))
    result = _run(chosen, settings, schedule)
    note_skipped(malformed)
    if report is not None:
        write_report(result, chosen, settings, schedule, report, overwrite=overwrite)
    _print(result.summary(), as_json)
    _refuse_total_failure(result.summary(), url)


def _run(requests: Sequence[Request], settings: ClientSettings, schedule: Schedule) -> ReplayResult:
    from reap_serve.traffic.replay import replay

    with progress_bar() as progress:
        task = progress.add_task("answers", total=len(requests))
        return asyncio.run(replay(requests, settings, schedule, on_answer=lambda _: progress.advance(task)))


def _refuse_total_failure(summary: ReplaySummary, url: str) -> None:
    if summary.failed == summary.requests:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in summary.failures.items())
        raise EngineError(f"{url} answered none of {summary.requests} requests: {reasons}", "see the server's log")


def _schedule(
    rate: float | None,
    burstiness: float | None,
    timed: bool,
    speedup: float | None,
    concurrency: int | None,
    seed: int,
) -> Schedule:
    from reap_serve.traffic.schedule import Concurrency, Rate, Timed

    if (rate is not None) + timed + (concurrency is not None) > 1:
        raise RequestError("--rate, --timed and --concurrency exclude each other", "give one of them")
    if burstiness is not None and rate is None:
        raise RequestError("--burstiness shapes the arrivals of --rate", "give --rate as well")
    if speedup is not None and not timed:
        raise RequestError("--speedup shortens the distances of --timed", "give --timed as well")
    if rate is not None:
        return Rate(requests_per_second=rate, burstiness=1.0 if burstiness is None else burstiness, seed=seed)
    if timed:
        return Timed(speedup=1.0 if speedup is None else speedup)
    return Concurrency(requests=1 if concurrency is None else concurrency)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise RequestError(f"the environment variable {variable} is not set", f"export {variable}=...")
    return key


def _print(summary: ReplaySummary, as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        print_json(summary)
        return
    table = Table("latency, ms", "mean", "p50", "p90", "p99", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("ttft", "itl", "tpot", "e2e"):
        found = getattr(summary.latency, name)
        values = () if found is None else (found.mean, found.p50, found.p90, found.p99)
        table.add_row(name, *(f"{1000 * value:.1f}" for value in values))
    stdout.print(table)
    stdout.print(
        f"{summary.requests:,} requests, {summary.failed:,} failed, {summary.seconds:.1f} s, "
        f"{summary.output_tokens / summary.seconds:.1f} output tokens/s",
    )
    for reason, count in summary.failures.items():
        stdout.print(f"failed: {count:,} × {reason}")
