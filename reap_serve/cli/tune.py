"""`reap-serve tune`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note, print_json, stdout
from reap_serve.cli.traffic_options import named_files, note_repeated
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from reap_serve.records import JsonValue
    from reap_serve.tune.record import TuneReport

_ASKED, _SPENT, _SERVED, _READ = "What is asked", "What it may spend", "How it will be served", "Traffic and output"


@app.command("tune")
def tune(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.", metavar="MODEL")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for plan.json, report.json and report.html.")
    ],
    traffic: Annotated[
        list[str] | None, typer.Argument(help="Traffic with recorded answers; - is stdin.", metavar="TRAFFIC...")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPR",
            help="What must hold of every figure's 95 % interval, such as 'slices.*.quality.perplexity_ratio<1.05' or "
            "'slices.*.quality.tool_calls_lost<=0'. Repeatable.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    keep_fraction: Annotated[
        float | None,
        typer.Option(help="Tune the choice alone, at this fraction of each layer's experts.", rich_help_panel=_ASKED),
    ] = None,
    keep_experts: Annotated[
        int | None, typer.Option(help="The same, at this number of experts.", rich_help_panel=_ASKED)
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="TIME|none",
            help="Time of the whole run, such as 30m or 2h; or tokens under masks, such as 500ktokens.",
            rich_help_panel=_SPENT,
        ),
    ] = "15m",
    trials: Annotated[
        bool,
        typer.Option("--trials/--no-trials", help="Try masks drawn at random, too.", rich_help_panel=_SPENT),
    ] = True,
    stats: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATS", help="Statistics to use instead of observing. Repeatable.", rich_help_panel=_SPENT
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the trials.", rich_help_panel=_SPENT)] = 0,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="vLLM's option of the same name, of the engine here, too.", rich_help_panel=_SERVED)
    ] = 1,
    expert_parallel_size: Annotated[
        int, typer.Option(help="Ranks that will share the experts.", rich_help_panel=_SERVED)
    ] = 1,
    multiple_of: Annotated[int, typer.Option(help="Keep a multiple of this.", rich_help_panel=_SERVED)] = 1,
    moe_backend: Annotated[
        str | None, typer.Option(help="vLLM's option of the same name.", rich_help_panel=_SERVED)
    ] = None,
    engine_args: Annotated[
        str, typer.Option(metavar="JSON", help="Further arguments of vLLM's engine.", rich_help_panel=_SERVED)
    ] = "{}",
    slices: Annotated[
        list[str] | None,
        typer.Option("--slice", metavar="NAME=FILE", help="Slice of a file.", rich_help_panel=_READ),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="Format of the traffic; found out by default.", rich_help_panel=_READ)
    ] = None,
    skip_malformed: Annotated[
        bool,
        typer.Option("--skip-malformed", help="Count malformed lines instead of stopping.", rich_help_panel=_READ),
    ] = False,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Longest greedy answer.", rich_help_panel=_READ)] = 64,
    answers_per_slice: Annotated[
        int, typer.Option(min=0, help="Greedy answers in each slice of each part.", rich_help_panel=_READ)
    ] = 16,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_READ)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find the smallest plan within your limits, or the best of a size, by trying plans as masks in one engine.

    A run that was stopped goes on where it was when the same command is given again.

    It does not weigh pruning against quantising harder: `reap-serve compare` does, given checkpoints of equal bytes.
    """
    if not traffic and not slices:
        raise RequestError("no traffic was given", "name at least one TRAFFIC file or --slice NAME=FILE")
    if keep_fraction is not None and keep_experts is not None:
        raise RequestError("--keep-fraction and --keep-experts contradict each other", "give one of them")
    arguments = _arguments(engine_args)
    from reap_serve.plan.limits import ServingTarget
    from reap_serve.plan.request import Size
    from reap_serve.publish import refuse_existing_directory
    from reap_serve.traffic.read import parse_slices, read_traffic
    from reap_serve.tune.request import TuneRequest, parse_budget
    from reap_serve.tune.run import tune as run

    refuse_existing_directory(output, overwrite, [model, *(stats or []), *named_files(traffic, slices)])
    note_repeated(traffic, slices)
    sized = keep_fraction is not None or keep_experts is not None
    request = TuneRequest(
        model=model,
        requests=tuple(
            read_traffic(traffic or [], format=format, slices=parse_slices(slices or []), skip_malformed=skip_malformed)
        ),
        output=output,
        limits=tuple(limit or ()),
        size=Size(keep_fraction, keep_experts) if sized else None,
        statistics=tuple(stats or ()),
        budget=parse_budget(budget),
        trials=trials,
        target=ServingTarget(multiple_of, tensor_parallel_size, expert_parallel_size, moe_backend),
        seed=seed,
        engine_arguments=arguments,
        max_answer_tokens=max_answer_tokens,
        answers_per_slice=answers_per_slice,
        overwrite=overwrite,
    )
    begun = time.monotonic()
    report = run(request, lambda line: note(f"{(time.monotonic() - begun) / 60:.1f} min of {budget}: {line}"))
    if as_json:
        print_json(report)
    else:
        _print(report)
    note(f"written: {output}")
    if report.plan is None:
        from reap_serve.errors import ThresholdError

        remedy = "raise --budget" if report.budget_exhausted else "loosen a limit, or serve the whole model"
        raise ThresholdError(report.reason, remedy)


def _arguments(text: str) -> dict[str, JsonValue]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise RequestError(f"--engine-args is not JSON: {error}", 'write it as \'{"dtype": "float32"}\'') from None
    if not isinstance(arguments, dict):
        raise RequestError("--engine-args is not a JSON object", 'write it as \'{"dtype": "float32"}\'')
    return arguments


def _print(report: TuneReport) -> None:
    from rich.table import Table

    table = Table(title="Plans that were tried")
    for column in ("experts", "rule", "requests", "KL, nats", "worst perplexity ratio", "limits"):
        table.add_column(column, justify="left" if column in ("rule", "requests") else "right")
    for entry in report.candidates:
        name = f"{entry.criterion}, {entry.variant}" if entry.variant else entry.criterion
        table.add_row(
            str(entry.keep_experts),
            f"{name} <- chosen" if entry.chosen else name,
            entry.part,
            f"{entry.figures.kl_divergence_mean:.4f}",
            f"{max(entry.figures.perplexity_ratio.values()):.4f}",
            "hold" if entry.held else "broken",
        )
    stdout.print(table)
    for limit in report.limits:
        value = "not measured" if limit.value is None else f"{limit.value:.4g} in {limit.slice}"
        stdout.print(f"{limit.limit}: {value}, {'held' if limit.held else 'broken'}")
    stdout.print(f"{report.keep_experts} of {report.num_experts} experts per layer: {report.reason}")
    for text in report.notes:
        stdout.print(text)
