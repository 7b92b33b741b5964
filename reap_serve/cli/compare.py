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
    from reap_serve.compare.record import Report


@app.command("compare")
def compare(
    base: Annotated[str, typer.Argument(help="Model directory, hub id, or URL of an OpenAI endpoint.")],
    candidate: Annotated[str, typer.Argument(help="Likewise.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for report.json.")],
    traffic: Annotated[list[str] | None, typer.Argument(help="Files; - is stdin.", metavar="TRAFFIC...")] = None,
    slices: Annotated[list[str] | None, typer.Option("--slice", metavar="NAME=FILE", help="Slice of a file.")] = None,
    server_args: Annotated[str, typer.Option(help="Options of `vllm serve` for models served here.")] = "",
    api_key_env: Annotated[str | None, typer.Option(help="Variable that holds the API key of the URLs.")] = None,
    max_answer_tokens: Annotated[int, typer.Option(help="Longest greedy answer.")] = 128,
    answers_per_slice: Annotated[int, typer.Option(help="Greedy answers in each slice; 0 for none.")] = 32,
    latency_requests: Annotated[int, typer.Option(help="Requests of the latency run; 0 for none.")] = 64,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once in the latency run.")] = 4,
    format: Annotated[str | None, typer.Option("--format", help="Format of the traffic; found out by default.")] = None,
    skip_malformed: Annotated[bool, typer.Option(help="Count malformed lines instead of stopping.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare a candidate with its base on your traffic: quality per slice, latency, memory."""
    if not traffic and not slices:
        raise RequestError("no traffic was given", "name at least one TRAFFIC file or --slice NAME=FILE")
    from reap_serve.compare.run import CompareSettings
    from reap_serve.compare.run import compare as run
    from reap_serve.compare.side import check_reference
    from reap_serve.compare.write import write_report
    from reap_serve.publish import refuse_existing
    from reap_serve.traffic.read import parse_slices, read_traffic

    refuse_existing(output, overwrite)
    for reference in (base, candidate):
        check_reference(reference)
    requests = list(
        read_traffic(traffic or [], format=format, slices=parse_slices(slices or []), skip_malformed=skip_malformed)
    )
    settings = CompareSettings(
        server_arguments=tuple(shlex.split(server_args)),
        api_key=os.environ.get(api_key_env) if api_key_env else None,
        max_answer_tokens=max_answer_tokens,
        answers_per_slice=answers_per_slice,
        latency_requests=latency_requests,
        concurrency=concurrency,
    )
    with progress_bar() as progress:
        tasks = {side: progress.add_task(side, total=len(requests)) for side in ("base", "candidate")}
        report = run(
            base,
            candidate,
            requests,
            settings,
            lambda side, done, total: progress.update(tasks[side], completed=done, total=total),
        )
    write_report(report, output, overwrite=overwrite)
    if as_json:
        print_json(report)
    else:
        _print_table(report)
        note(f"report: {output}/report.json")


def _print_table(report: Report) -> None:
    from rich.table import Table

    table = Table(title=f"{report.candidate} against {report.base}")
    for heading in ("slice", "tokens", "perplexity", "candidate", "ratio", "KL mean", "KL p99", "same top", "loops"):
        table.add_column(heading, justify="left" if heading == "slice" else "right")
    for name, entry in report.slices.items():
        quality = entry.quality
        table.add_row(
            name,
            str(quality.tokens),
            f"{quality.perplexity_base:.3f}",
            f"{quality.perplexity_candidate:.3f}",
            f"{quality.perplexity_ratio:.3f}",
            f"{quality.kl_divergence_mean:.4f}",
            f"{quality.kl_divergence_p99:.3f}",
            f"{quality.same_top_token_fraction:.1%}",
            "-" if quality.loop_fraction_candidate is None else f"{quality.loop_fraction_candidate:.1%}",
        )
    stdout.print(table)
