"""`reap-serve traffic`: what is in recorded traffic, a sample of it, and the same in OpenAI Batch lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note, print_json, progress_bar, stdout

if TYPE_CHECKING:
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.receipt import Receipt, SliceReceipt
    from reap_serve.traffic.request import Request
    from reap_serve.traffic.summary import TrafficSummary

traffic_app = typer.Typer(no_args_is_help=True, help="Look into recorded traffic, sample it, convert it.")
app.add_typer(traffic_app, name="traffic")

TrafficFiles = Annotated[
    list[str] | None, typer.Argument(metavar="TRAFFIC...", help="Traffic files, plain, gzip or zstd; - is stdin.")
]
SliceFiles = Annotated[list[str] | None, typer.Option("--slice", metavar="NAME=FILE", help="Slice of a file.")]
FormatName = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="Format of the files; found out by default.")
]
SkipMalformed = Annotated[
    bool, typer.Option("--skip-malformed", help="Count malformed records instead of stopping at the first.")
]
TrustTemplate = Annotated[
    bool,
    typer.Option(
        "--trust-request-chat-template",
        help="Take requests that bring a chat template: a stranger's code, run with bounded time and memory.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="MODEL", help="Count tokens of this model; else characters/4."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write: OpenAI Batch JSONL.")]


class AllocationName(StrEnum):
    """Names of `--allocation`."""

    PROPORTIONAL = "proportional"
    EQUAL = "equal"


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

    requests, malformed = open_traffic(
        files, slices, format, skip_malformed, require_text=False, keep_templates=trust_template
    )
    tally = SummaryTally(token_counter(tokenizer))
    refusals = Refusals(skip_malformed, malformed)
    with counted(requests) as counted_requests:
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
        _print_summary(summary)


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
    from reap_serve.publish import new_file, refuse_existing
    from reap_serve.traffic.convert import write_batch
    from reap_serve.traffic.refusal import Refusals
    from reap_serve.traffic.sample import sample_traffic
    from reap_serve.traffic.summary import SummaryTally
    from reap_serve.traffic.tokens import measurable, token_counter

    refuse_existing(output, overwrite)
    requests, malformed = open_traffic(files, slices, format, skip_malformed, keep_templates=trust_template)
    counter = token_counter(tokenizer)
    refusals = Refusals(skip_malformed, malformed)
    with counted(requests) as counted_requests:
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
        _print_summary(summary)


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
    from reap_serve.publish import new_file, refuse_existing
    from reap_serve.traffic.convert import write_batch

    refuse_existing(output, overwrite)
    requests, malformed = open_traffic(files, slices, format, skip_malformed, keep_templates=trust_template)
    with counted(requests) as counted_requests, new_file(output, overwrite=overwrite) as stream:
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


def open_traffic(
    files: list[str] | None,
    slices: list[str] | None,
    format: str | None,
    skip_malformed: bool,
    *,
    require_text: bool = True,
    keep_templates: bool = False,
) -> tuple[Iterator[Request], Malformed]:
    """The requests that the options of a traffic command name, and the tally of what is skipped.

    Raises:
        RequestError: No file is named.
    """
    from reap_serve.errors import RequestError
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.own_template import keep_own_template, refuse_own_template
    from reap_serve.traffic.read import parse_slices, read_traffic

    if not files and not slices:
        raise RequestError("no traffic was given", "name at least one TRAFFIC file or --slice NAME=FILE")
    malformed = Malformed()
    requests = read_traffic(
        files or [],
        format=format,
        slices=parse_slices(slices or []),
        skip_malformed=skip_malformed,
        require_text=require_text,
        malformed=malformed,
        settle_template=keep_own_template if keep_templates else refuse_own_template,
    )
    return requests, malformed


def note_skipped(malformed: Malformed) -> None:
    """Says on stderr which records were passed over, and what was replaced in others, if any."""
    if malformed.total:
        note(f"{malformed.total} records were skipped: {malformed}")
    if malformed.replaced:
        note(f"{malformed.replaced} halves of surrogate pairs were replaced by U+FFFD")


def note_receipt(receipt: Receipt) -> None:
    """Says on stderr what was asked for and what reached the model, a line for each file and slice."""
    for path, file in receipt.files.items():
        for name, part in file.slices.items():
            note(f"{path}, slice {name}: {_receipt_line(part)}")
        for difference in file.differences:
            note(
                f"  {difference.place}: the log states {difference.recorded} {difference.part} tokens, "
                f"{difference.rendered} were rendered"
            )


def _receipt_line(part: SliceReceipt) -> str:
    said = [
        f"{part.requests:,} requests, {part.reached:,} reach the model",
        f"{part.turns:,} turns, {part.tool_calls:,} tool calls, {part.tools:,} tools, {part.answers:,} answers",
    ]
    if part.broken_answers:
        said.append(f"{part.broken_answers:,} answers broke off")
    if part.unread_answers:
        said.append(f"{part.unread_answers:,} further answers are not read")
    for what, counts, recorded, rendered, deviation in (
        (
            "prompt",
            part.prompt_counts,
            part.prompt_tokens_recorded,
            part.prompt_tokens_rendered,
            part.prompt_deviation,
        ),
        (
            "answer",
            part.answer_counts,
            part.answer_tokens_recorded,
            part.answer_tokens_rendered,
            part.answer_deviation,
        ),
    ):
        if deviation is not None:
            said.append(
                f"{what} tokens of {counts:,} records: {recorded:,} in the log, {rendered:,} rendered "
                f"({deviation:.1%} apart)"
            )
    if part.differing:
        said.append(f"{part.differing:,} records differ by more than the template explains")
    return "; ".join(said)


@contextlib.contextmanager
def counted(requests: Iterable[Request]) -> Iterator[Iterator[Request]]:
    """The requests, counted by a progress bar while they are read."""
    with progress_bar() as progress:
        task = progress.add_task("requests", total=None)

        def advance() -> Iterator[Request]:
            for number, request in enumerate(requests, start=1):
                yield request
                # Drawing is slower than reading.
                if number % 1024 == 0:
                    progress.update(task, completed=number)

        yield advance()


def _print_summary(summary: TrafficSummary) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("slice", *(("requests", "answers", "prompt tokens", "output tokens")), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in summary.slices.items():
        cells = (row.requests, row.answers, row.prompt_tokens, row.output_tokens)
        # A name is a client's text: brackets in it are no markup.
        table.add_row(Text(name), *(f"{cell:,}" for cell in cells))
    stdout.print(table)
    formats = ", ".join(f"{name} {count:,}" for name, count in summary.formats.items())
    sessions = f"{summary.sessions:,}" if summary.sessions_complete else f"at least {summary.sessions:,}"
    duration = "no timestamps" if summary.duration_seconds is None else f"{summary.duration_seconds:,.1f} s"
    stdout.print(
        f"{summary.requests:,} requests ({summary.length_only:,} of lengths only); formats: {formats}; "
        f"sessions: {sessions}; duration: {duration}; tokens: {summary.token_unit}",
    )
    for reason, count in summary.malformed.items():
        stdout.print(f"skipped: {count:,} × {reason}")
    if summary.replaced_surrogates:
        stdout.print(f"replaced: {summary.replaced_surrogates:,} halves of surrogate pairs")
    for path, file in summary.receipt.files.items():
        for name, part in file.slices.items():
            stdout.print(f"{path}, slice {name}: {_receipt_line(part)}")
        for difference in file.differences:
            stdout.print(
                f"  {difference.place}: {difference.recorded} {difference.part} tokens in the log, "
                f"{difference.rendered} rendered",
            )
