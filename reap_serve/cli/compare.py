"""`reap-serve compare`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note, print_json, progress_bar, stdout
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from reap_serve.compare.record import Quality, Report


@app.command("compare")
def compare(
    base: Annotated[str, typer.Argument(help="Model directory, hub id, or URL of an OpenAI endpoint of vLLM.")],
    candidate: Annotated[str, typer.Argument(help="Likewise.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for report.json and report.html.")],
    traffic: Annotated[list[str] | None, typer.Argument(help="Files; - is stdin.", metavar="TRAFFIC...")] = None,
    slices: Annotated[list[str] | None, typer.Option("--slice", metavar="NAME=FILE", help="Slice of a file.")] = None,
    server_args: Annotated[
        str,
        typer.Option(
            help="Options of `vllm serve` for models served here. The same --gpu-memory-utilization gives both the "
            "same memory, and the smaller model more KV cache; the same --kv-cache-memory-bytes gives both the same "
            "KV cache, and the smaller model takes less memory."
        ),
    ] = "",
    api_key_env: Annotated[str | None, typer.Option(help="Variable that holds the API key of the URLs.")] = None,
    plan: Annotated[Path | None, typer.Option(help="The candidate's plan, to draw in report.html.")] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIGURE>NUMBER",
            help="Exit 1 when this holds, such as 'slices.code.quality.kl_divergence_mean>0.05' or "
            "'slices.*.quality.loop_fraction_candidate>0.02'. Repeatable.",
        ),
    ] = None,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor/--no-noise-floor", help="Measure the base twice, and tell what differs.")
    ] = True,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Longest greedy answer.")] = 128,
    answers_per_slice: Annotated[int, typer.Option(min=0, help="Greedy answers in each slice; 0 for none.")] = 32,
    latency_requests: Annotated[int, typer.Option(min=0, help="Requests of each latency run; 0 for none.")] = 64,
    concurrency: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Requests under way at once; one latency run each.")
    ] = "4",
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Objective of a good request: ttft, tpot or e2el. Repeatable."),
    ] = None,
    format: Annotated[str | None, typer.Option("--format", help="Format of the traffic; found out by default.")] = None,
    skip_malformed: Annotated[bool, typer.Option(help="Count malformed lines instead of stopping.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare a candidate with its base on your traffic: quality per slice, latency, memory."""
    if not traffic and not slices:
        raise RequestError("no traffic was given", "name at least one TRAFFIC file or --slice NAME=FILE")
    from reap_serve.compare.gate import parse_gates, require_passed
    from reap_serve.compare.latency import parse_objectives
    from reap_serve.compare.run import CompareSettings
    from reap_serve.compare.run import compare as run
    from reap_serve.compare.side import check_reference
    from reap_serve.compare.write import write_report
    from reap_serve.plan.record import read_plan
    from reap_serve.publish import refuse_existing
    from reap_serve.traffic.read import parse_slices, read_traffic

    refuse_existing(output, overwrite)
    for reference in (base, candidate):
        check_reference(reference)
    settings = CompareSettings(
        server_arguments=tuple(shlex.split(server_args)),
        api_key=os.environ.get(api_key_env) if api_key_env else None,
        max_answer_tokens=max_answer_tokens,
        answers_per_slice=answers_per_slice,
        latency_requests=latency_requests,
        concurrency=_concurrencies(concurrency),
        objectives=parse_objectives(goodput or []),
        noise_floor=noise_floor,
    )
    read = None if plan is None else read_plan(plan)
    requests = list(
        read_traffic(traffic or [], format=format, slices=parse_slices(slices or []), skip_malformed=skip_malformed)
    )
    gates = parse_gates(fail_if or [], {request.slice for request in requests})
    with progress_bar() as progress:
        tasks = {side: progress.add_task(side, total=len(requests)) for side in ("base", "candidate")}
        comparison = run(
            base,
            candidate,
            requests,
            settings,
            lambda side, done, total: progress.update(tasks[side], completed=done, total=total),
        )
    written = write_report(comparison.report, output, overwrite=overwrite, plan=read, replays=comparison.replays)
    if as_json:
        print_json(comparison.report)
    else:
        _print_table(comparison.report)
    for path in written:
        note(f"written: {path}")
    if output / "report.html" not in written:
        note("no report.html: pip install 'reap-serve[report]'")
    require_passed(gates, comparison.report)


def _concurrencies(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RequestError(f"--concurrency {text} is no list of numbers above 0", "give such as 4 or 1,4,16")
    return tuple(int(part) for part in parts)


def _print_table(report: Report) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from reap_serve.compare.verdict import judge_slice, verdict_line

    stdout.print(verdict_line(report), markup=False)
    # Two lines a slice: the figures and their intervals fit 80 columns.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_lines=True)
    for heading in ("slice\ntokens", "KL mean", "base\ntwice", "ppl", "ratio", "same\ntop", "loops", "verdict"):
        table.add_column(heading, justify="left" if heading == "slice\ntokens" else "right", no_wrap=True)
    for name, entry in report.slices.items():
        quality = entry.quality
        table.add_row(
            f"{name}\n{quality.tokens}",
            _with_interval(quality, "kl_divergence_mean", ".3f"),
            "-" if entry.noise_floor is None else f"{entry.noise_floor.kl_divergence_mean:.3f}",
            f"{quality.perplexity_base:.2f}\n-> {quality.perplexity_candidate:.2f}",
            _with_interval(quality, "perplexity_ratio", ".2f"),
            f"{quality.same_top_token_fraction:.0%}",
            f"{_share(quality.loop_fraction_base)}\n-> {_share(quality.loop_fraction_candidate)}",
            judge_slice(quality).level,
        )
    stdout.print(table)
    stdout.print(
        f"{report.candidate} against {report.base}; below a figure its 95 % interval over requests", markup=False
    )


def _with_interval(quality: Quality, name: str, form: str) -> str:
    interval = quality.intervals.get(name)
    text = f"{getattr(quality, name):{form}}"
    return text if interval is None else f"{text}\n{interval[0]:{form}}-{interval[1]:{form}}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
