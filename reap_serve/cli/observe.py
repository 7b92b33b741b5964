"""`reap-serve observe`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import keep_stdout_for, note, print_json, progress_bar
from reap_serve.cli.traffic_options import (
    NoSkipMalformed,
    ReadingBar,
    named_files,
    note_repeated,
    trust_template_option,
)
from reap_serve.cli.traffic_tables import note_receipt, note_skipped
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.own_template import SettleTemplate
    from reap_serve.traffic.request import Request

_RECORDED, _ENGINE, _TRAFFIC, _OUTPUT = "What is recorded", "Engine", "Traffic", "Output"


@app.command("observe")
def observe(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.", metavar="MODEL")],
    traffic: Annotated[
        list[str] | None, typer.Argument(help="Traffic files; - is stdin.", metavar="TRAFFIC...")
    ] = None,
    slices: Annotated[
        list[str] | None,
        typer.Option("--slice", metavar="NAME=FILE", help="Slice of a file.", rich_help_panel=_TRAFFIC),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Statistics file to write.", rich_help_panel=_OUTPUT)
    ] = ...,  # type: ignore[assignment]
    recorder: Annotated[
        Literal["auto", "inline", "deferred", "moe_sum"],
        typer.Option(
            help="How to record; auto takes for each layer what is exact and costs least.", rich_help_panel=_RECORDED
        ),
    ] = "auto",
    sample_fraction: Annotated[
        float, typer.Option(help="Probability of recording a token, above 0 to 1.", rich_help_panel=_RECORDED)
    ] = 1.0,
    extra_sums: Annotated[
        list[str] | None,
        typer.Option(
            "--extra-sum",
            metavar="NAME",
            help="Also collect this sum, such as output_sum, which merging needs; a wrong name lists them; may be "
            "repeated.",
            rich_help_panel=_RECORDED,
        ),
    ] = None,
    keep_kernel: Annotated[
        bool,
        typer.Option(
            "--keep-kernel",
            help="Leave the experts' kernel to vLLM, and refuse where it cannot be observed.",
            rich_help_panel=_RECORDED,
        ),
    ] = False,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence of the engine, tokens.", rich_help_panel=_ENGINE)
    ] = None,
    engine_args: Annotated[
        str, typer.Option(metavar="JSON", help="Further arguments of vLLM's engine.", rich_help_panel=_ENGINE)
    ] = "{}",
    format: Annotated[
        str | None,
        typer.Option("--format", help="Format of the traffic; found out by default.", rich_help_panel=_TRAFFIC),
    ] = None,
    skip_malformed: Annotated[
        bool,
        typer.Option("--skip-malformed", help="Count malformed lines instead of stopping.", rich_help_panel=_TRAFFIC),
    ] = False,
    no_skip_malformed: NoSkipMalformed = False,
    trust_template: Annotated[bool, trust_template_option(_TRAFFIC)] = False,
    strict_traffic: Annotated[
        bool,
        typer.Option(
            "--strict-traffic",
            help="Write nothing when the log's own token counts and the rendered ones are more than 3 % apart.",
            rich_help_panel=_TRAFFIC,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Run traffic through vLLM and write the statistics of its experts."""
    if not traffic and not slices:
        raise RequestError("no traffic was given", "name at least one TRAFFIC file or --slice NAME=FILE")
    if not 0.0 < sample_fraction <= 1.0:
        raise RequestError(f"--sample-fraction {sample_fraction} is not in (0, 1]", "give a fraction such as 0.1")
    skip_malformed = skip_malformed and not no_skip_malformed
    try:
        arguments = json.loads(engine_args)
    except ValueError as error:
        raise RequestError(f"--engine-args is not JSON: {error}", 'write it as \'{"dtype": "float32"}\'') from None
    if not isinstance(arguments, dict):
        raise RequestError("--engine-args is not a JSON object", 'write it as \'{"dtype": "float32"}\'')

    from reap_serve.adapter.offline import observe_traffic
    from reap_serve.file_kinds import STATISTICS
    from reap_serve.model import open_model
    from reap_serve.publish import refuse_existing
    from reap_serve.record.settings import ObserveSettings, extra_sums_named
    from reap_serve.statistics.file import write_statistics
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.own_template import (
        TemplateSandbox,
        keep_own_template,
        refuse_own_template,
        special_tokens_of,
    )
    from reap_serve.traffic.read import parse_slices, read_traffic
    from reap_serve.traffic.refusal import Refusals
    from reap_serve.traffic.strict import RENDERING_ARGUMENTS, longest_request, refuse_differing, require_stated_counts
    from reap_serve.traffic.tokens import token_counter

    keep_stdout_for(output)
    refuse_existing(output, overwrite, STATISTICS, [model, *named_files(traffic, slices)])
    note_repeated(traffic, slices)
    source = open_model(model)
    malformed = Malformed()
    sandbox = TemplateSandbox(special_tokens_of(source.path))

    def read(settle: SettleTemplate, tally: Malformed, bar: ReadingBar | None = None) -> Iterator[Request]:
        return read_traffic(
            traffic or [],
            format=format,
            slices=parse_slices(slices or []),
            skip_malformed=skip_malformed,
            malformed=tally,
            settle_template=settle,
            on_bytes=None if bar is None else bar.advance,
        )

    if max_model_len is not None:
        arguments.setdefault("max_model_len", max_model_len)
    total = None
    bar = ReadingBar(traffic, slices)
    if bar.sized:
        # Read to its end before an engine starts: a line that is wrong ends the run here, and what remains is known.
        with bar.counted(read(keep_own_template if trust_template else refuse_own_template, Malformed(), bar)) as found:
            if strict_traffic and RENDERING_ARGUMENTS.isdisjoint(arguments):
                total = require_stated_counts(
                    found, token_counter(str(source.path)), longest_request(arguments, source)
                )
            else:
                total = sum(1 for _ in found)
    requests = read(sandbox.settle if trust_template else refuse_own_template, malformed)
    settings = ObserveSettings(
        recorder=recorder,
        outputs_served=False,
        keep_kernel=keep_kernel,
        sample_fraction=sample_fraction,
        extra_sums=extra_sums_named(extra_sums or ()),
    )
    with sandbox, progress_bar() as progress:
        task = progress.add_task("requests", total=total)
        done = observe_traffic(
            source,
            requests,
            settings,
            arguments,
            lambda count: progress.update(task, completed=count),
            Refusals(skip_malformed, malformed),
        )
    if strict_traffic:
        refuse_differing(done.receipt)
    write_statistics(done.statistics, str(output), overwrite=overwrite)
    if done.too_long:
        note(f"{done.too_long} requests were left out: longer than the engine's --max-model-len")
    if done.unanswered:
        note(f"{done.unanswered} requests have no recorded answer: only their prompts were run")
    note_skipped(malformed)
    for warning in done.receipt.warnings():
        note(f"warning: {warning}")
    rate = done.tokens / done.seconds
    if as_json:
        print_json(
            {
                "tokens": done.tokens,
                "requests": done.requests,
                "seconds": round(done.seconds, 3),
                "tokens_per_second": round(rate, 1),
                "stats": str(output),
                "too_long": done.too_long,
                "unanswered": done.unanswered,
                "malformed": sum(malformed.counts.values()),
                "receipt": done.receipt.model_dump(mode="json"),
            }
        )
    else:
        note_receipt(done.receipt)
        note(f"{done.requests} requests, {done.tokens} tokens in {done.seconds:.1f} s ({rate:.0f} tokens/s): {output}")
