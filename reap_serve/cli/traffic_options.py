"""Options that name recorded traffic, and the requests that they name."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from reap_serve.cli.output import note, progress_bar

if TYPE_CHECKING:
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.request import Request

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

# The default, by the name that 0.1.0 gave it in `observe` and `compare`.
NoSkipMalformed = Annotated[bool, typer.Option("--no-skip-malformed", hidden=True)]


def trust_template_option(panel: str | None = None) -> OptionInfo:
    """`--trust-request-chat-template`, in a panel of the help."""
    option: OptionInfo = typer.Option(
        "--trust-request-chat-template",
        help="Take requests that bring a chat template: a stranger's code, run with bounded time and memory.",
        rich_help_panel=panel,
    )
    return option


TrustTemplate = Annotated[bool, trust_template_option()]
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


def named_files(files: list[str] | None, slices: list[str] | None) -> list[str]:
    """The files that TRAFFIC and the values of `--slice` name."""
    return [*(files or ()), *(option.partition("=")[2] for option in slices or ())]


def note_repeated(files: list[str] | None, slices: list[str] | None) -> None:
    """Says on stderr which files are named twice, as each is read once."""
    for named in (files or [], [option.partition("=")[2] for option in slices or []]):
        for path, times in Counter(named).items():
            if times > 1:
                note(f"note: {path} is given {times} times and read once")


class ReadingBar:
    """A progress bar of the bytes of traffic files, with the number of their requests.

    Args:
        files: Files; standard input has no length.
        slices: Further files, as NAME=FILE.

    Attributes:
        sized: Whether the files can be read twice, and how much is left of them is known.
    """

    def __init__(self, files: list[str] | None, slices: list[str] | None) -> None:
        paths = set(named_files(files, slices))
        self.sized = all(os.path.isfile(path) for path in paths)
        self._bar = progress_bar(of_bytes=True)
        self._task = self._bar.add_task("requests", total=sum(map(os.path.getsize, paths)) if self.sized else None)

    def advance(self, num_bytes: int) -> None:
        """Takes note of bytes that were read."""
        self._bar.advance(self._task, num_bytes)

    @contextlib.contextmanager
    def counted(self, requests: Iterable[Request]) -> Iterator[Iterator[Request]]:
        """The requests, counted while they are read."""

        def count() -> Iterator[Request]:
            for number, request in enumerate(requests, start=1):
                yield request
                # Drawing is slower than reading.
                if number % 1024 == 0:
                    self._bar.update(self._task, description=f"{number:,} requests")

        with self._bar:
            yield count()


def open_traffic(
    files: list[str] | None,
    slices: list[str] | None,
    format: str | None,
    skip_malformed: bool,
    *,
    require_text: bool = True,
    keep_templates: bool = False,
    bar: ReadingBar | None = None,
) -> tuple[Iterator[Request], Malformed]:
    """The requests that the options of a traffic command name, and the tally of what is skipped.

    Args:
        files: TRAFFIC.
        slices: Values of `--slice`.
        format: Name of the format; None finds it out.
        skip_malformed: Count malformed records instead of stopping.
        require_text: Refuse requests of which only lengths were recorded.
        keep_templates: Take requests that bring a chat template.
        bar: Shows how much of the files was read.

    Raises:
        RequestError: No file is named.
    """
    from reap_serve.errors import RequestError
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.own_template import keep_own_template, refuse_own_template
    from reap_serve.traffic.read import parse_slices, read_traffic

    if not files and not slices:
        raise RequestError("no traffic was given", "name at least one TRAFFIC file or --slice NAME=FILE")
    note_repeated(files, slices)
    malformed = Malformed()
    requests = read_traffic(
        files or [],
        format=format,
        slices=parse_slices(slices or []),
        skip_malformed=skip_malformed,
        require_text=require_text,
        malformed=malformed,
        settle_template=keep_own_template if keep_templates else refuse_own_template,
        on_bytes=None if bar is None else bar.advance,
    )
    return requests, malformed
