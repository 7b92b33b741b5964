"""`reap-serve traffic`: what is in recorded traffic, a sample of it, and the same in OpenAI Batch lines."""

from __future__ import annotations

from typing import Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import keep_stdout_for, note, print_json, stdout
from reap_serve.cli.traffic_options import (
    AllocationName,
    FormatName,
    Json,
    Output,
    Overwrite,
    ReadingBar,
    SkipMalformed,
    SliceFiles,
    Tokenizer,
    TrafficFiles,
    TrustTemplate,
    named_files,
    open_traffic,
)
from reap_serve.cli.traffic_tables import note_skipped, print_summary

traffic_app = typer.Typer(no_args_is_help=True, help="Look into recorded traffic, sample it, convert it.")
app.add_typer(traffic_app, name="traffic")


@traffic_app.command("show")
def show(
    files: TrafficFiles = None,
    slices: SliceFiles = None,
    format: FormatName = None,
    skip_malformed: SkipMalformed = False,
    trust_template: TrustTemplate = False,
    tokenizer: Tokenizer = None,
    as_json: Json = False,
) -> None:
    """Count requests, tokens by slice, formats, sessions and malformed records, with a receipt of what is in them."""
    from reap_serve.traffic.refusal import Refusals, RefusedRecordError
    from reap_serve.traffic.summary import SummaryTally
    from reap_serve.traffic.tokens import token_counter

    bar = ReadingBar(files, slices)
    requests, malformed = open_traffic(
        files, slices, format, skip_malformed, require_text=False, keep_templates=trust_template, bar=bar
    )
    tally = SummaryTally(token_counter(tokenizer))
    refusals = Refusals(skip_malformed, malformed)
    with bar.counted(requests) as counted_requests:
        for request in counted_requests:
            try:
                tally.add(request)
            except RefusedRecordError as error:
                refusals.refuse(request, error)
    summary = tally.summary(malformed)
    for warning in summary.receipt.warnings():
        note(f"warning: {warning}")
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)


@traffic_app.command("sample")
def sample(
    output: Output,
    tokens: Annotated[int, typer.Option(help="Tokens wanted, prompts and answers together.", min=1)],
    files: TrafficFiles = None,
    slices: SliceFiles = None,
    format: FormatName = None,
    skip_malformed: SkipMalformed = False,
    trust_template: TrustTemplate = False,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    allocation: Annotated[
        AllocationName, typer.Option(help="How slices share the tokens: as in the traffic, or equally.")
    ] = AllocationName.PROPORTIONAL,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Choose requests at random, stratified by slice, until their tokens suffice."""
    from reap_serve.file_kinds import BATCH
    from reap_serve.publish import new_file, refuse_existing
    from reap_serve.traffic.convert import write_batch
    from reap_serve.traffic.refusal import Refusals
    from reap_serve.traffic.sample import sample_traffic
    from reap_serve.traffic.summary import SummaryTally
    from reap_serve.traffic.tokens import measurable, token_counter

    keep_stdout_for(output)
    refuse_existing(output, overwrite, BATCH, named_files(files, slices))
    bar = ReadingBar(files, slices)
    requests, malformed = open_traffic(files, slices, format, skip_malformed, keep_templates=trust_template, bar=bar)
    counter = token_counter(tokenizer)
    refusals = Refusals(skip_malformed, malformed)
    with bar.counted(requests) as counted_requests:
        chosen = sample_traffic(
            measurable(counted_requests, counter, refusals) if tokenizer else counted_requests,
            tokens=tokens,
            seed=seed,
            counter=counter,
            allocation=allocation.value,
        )
    with new_file(output, overwrite=overwrite) as stream:
        write_batch(chosen, stream)
    tally = SummaryTally(counter)
    for request in chosen:
        tally.add(request)
    summary = tally.summary(malformed)
    if as_json:
        print_json({"output": str(output), "seed": seed, **summary.model_dump(mode="json")})
    else:
        print_summary(summary)


@traffic_app.command("convert")
def convert(
    output: Output,
    files: TrafficFiles = None,
    slices: SliceFiles = None,
    format: FormatName = None,
    skip_malformed: SkipMalformed = False,
    trust_template: TrustTemplate = False,
    model: Annotated[str | None, typer.Option(help="Model to name in every body; the recorded one by default.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write any format as OpenAI Batch JSONL, with the recorded answers."""
    from reap_serve.file_kinds import BATCH
    from reap_serve.publish import new_file, refuse_existing
    from reap_serve.traffic.convert import write_batch

    keep_stdout_for(output)
    refuse_existing(output, overwrite, BATCH, named_files(files, slices))
    bar = ReadingBar(files, slices)
    requests, malformed = open_traffic(files, slices, format, skip_malformed, keep_templates=trust_template, bar=bar)
    with bar.counted(requests) as counted_requests, new_file(output, overwrite=overwrite) as stream:
        written = write_batch(counted_requests, stream, model=model)
    if as_json:
        replaced = malformed.replaced
        print_json(
            {
                "output": str(output),
                "requests": written,
                "malformed": malformed.counts,
                "replaced_surrogates": replaced,
            }
        )
    else:
        stdout.print(f"{written} requests written to {output}")
        note_skipped(malformed)
