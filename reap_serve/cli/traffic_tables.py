"""What was read of recorded traffic: notes on stderr, and the table of `traffic show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap_serve.cli.output import note, stdout

if TYPE_CHECKING:
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.receipt import Receipt, SliceReceipt
    from reap_serve.traffic.summary import TrafficSummary


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


def print_summary(summary: TrafficSummary) -> None:
    """Prints a table of the slices, and a line each for what else was counted."""
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
