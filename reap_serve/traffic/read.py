"""Recorded requests from files of any known format, one at a time."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from reap_serve.errors import InputFileError, TrafficError
from reap_serve.slice_name import RULE, is_slice_name
from reap_serve.traffic.formats import FORMATS
from reap_serve.traffic.formats.spec import Format
from reap_serve.traffic.malformed import Malformed, MalformedRecordError
from reap_serve.traffic.own_template import SettleTemplate, refuse_own_template
from reap_serve.traffic.placeholders import require_text_as_written
from reap_serve.traffic.request import DEFAULT_SLICE, Origin, Request
from reap_serve.traffic.rows import NOT_UTF8, MendedRow, NumberedRow, read_rows
from reap_serve.traffic.source import STDIN, open_source

# Records that are looked at before a format counts as unknown.
_DETECTION_ROWS = 64
# Keys of a record that is not known, in an error: names of fields, and no text that a record may have for one.
_SHOWN_KEYS = 8
_FIELD = re.compile(r"[A-Za-z_][\w.]{0,39}")
_GIVE = "write one request a line"
_NO_TEXT = "no text was recorded"


def parse_slices(options: Sequence[str]) -> dict[str, list[str]]:
    """The files of each slice, from the values of `--slice NAME=FILE`.

    Raises:
        TrafficError: A value is not of that form, or its name breaks the rule for names of slices.
    """
    slices: dict[str, list[str]] = {}
    for option in options:
        name, separator, path = option.partition("=")
        if not (name and separator and path):
            raise TrafficError(f"--slice {option} is not NAME=FILE", "write it as --slice code=code.jsonl")
        if not is_slice_name(name):
            raise TrafficError(f"--slice {option}: the name is not {RULE}", "give a shorter or a plainer name")
        slices.setdefault(name, []).append(path)
    return slices


def read_traffic(
    paths: Sequence[str],
    *,
    format: str | None = None,
    slices: Mapping[str, str | Sequence[str]] | None = None,
    skip_malformed: bool = False,
    require_text: bool = True,
    malformed: Malformed | None = None,
    settle_template: SettleTemplate = refuse_own_template,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Request]:
    """The requests in traffic files, in order; memory is bounded by the longest record.

    A request's slice is `body.metadata.reap_slice`, else the slice of its file, else `default`. A file that is named
    in `slices` and not in `paths` is read as well, after the others.

    Args:
        paths: Files, plain, gzip or zstd; `-` is standard input.
        format: Name of the format of all files; None finds it out for each from its first records.
        slices: File or files of each slice.
        skip_malformed: Pass over malformed records and count them, instead of stopping at the first.
        require_text: Refuse requests of which only lengths were recorded.
        malformed: Tally to count the skipped records in.
        settle_template: What becomes of requests that bring a chat template; refuses them by default.
        on_bytes: Called with the bytes read of the files, as they come.

    Yields:
        Requests.

    Raises:
        InputFileError: A file is missing, unreadable, truncated or corrupt.
        TrafficError: A record is malformed, a format is unknown or unusable, or there is no request at all.
    """
    if format is not None and format not in FORMATS:
        raise TrafficError(f"format {format!r} is not known", f"give one of {', '.join(FORMATS)}")
    slice_of = _slice_by_path(slices or {})
    files = list(dict.fromkeys([*paths, *slice_of]))
    for path in files:
        if path != STDIN and not os.path.isfile(path):
            state = "is not a file" if os.path.exists(path) else "does not exist"
            raise InputFileError(f"{path} {state}", "check the path")
    return _read_files(
        files, format, slice_of, skip_malformed, require_text, malformed or Malformed(), settle_template, on_bytes
    )


def _slice_by_path(slices: Mapping[str, str | Sequence[str]]) -> dict[str, str]:
    slice_of: dict[str, str] = {}
    for name, files in slices.items():
        for path in [files] if isinstance(files, str) else files:
            if slice_of.setdefault(path, name) != name:
                raise TrafficError(f"{path} is given for the slices {slice_of[path]} and {name}", "give it once")
    return slice_of


def _read_files(
    files: Sequence[str],
    format: str | None,
    slice_of: Mapping[str, str],
    skip_malformed: bool,
    require_text: bool,
    malformed: Malformed,
    settle_template: SettleTemplate,
    on_bytes: Callable[[int], None] | None,
) -> Iterator[Request]:
    found = False
    for path in files:
        with open_source(path, on_bytes) as stream, contextlib.closing(read_rows(stream)) as rows:
            kind, head = _find_format(rows, path, skip_malformed) if format is None else (FORMATS[format], [])
            if require_text and not kind.has_text:
                raise _lengths_only(path, kind)
            slice_name = slice_of.get(path, DEFAULT_SLICE)
            for part in (head, rows):
                for line, row in part:
                    try:
                        if isinstance(row, MalformedRecordError):
                            raise row
                        if isinstance(row, MendedRow):
                            malformed.replaced += row.replaced
                        for request in kind.parse(row, Origin(path, kind.name, line), slice_name):
                            if require_text and not request.has_text:
                                if not skip_malformed:
                                    raise _lengths_only(f"{path}:{line}", kind)
                                raise MalformedRecordError(_NO_TEXT)
                            require_text_as_written(request)
                            settled = settle_template(request)
                            found = True
                            yield settled
                    except MalformedRecordError as error:
                        if not skip_malformed:
                            raise TrafficError(f"{path}:{line}: {error}", _remedy(error)) from None
                        malformed.add(error.reason, f"{path}:{line}")
    if not found:
        skipped = f" ({malformed.total} records were skipped: {malformed})" if malformed.total else ""
        raise TrafficError(f"{', '.join(files)}: no request{skipped}", "give a file with recorded requests")


def _find_format(rows: Iterator[NumberedRow], path: str, skip_malformed: bool) -> tuple[Format, list[NumberedRow]]:
    """The format of the first record that one recognises, and the records read so far."""
    head: list[NumberedRow] = []
    for line, row in rows:
        head.append((line, row))
        if isinstance(row, MalformedRecordError):
            if not skip_malformed:
                break
        else:
            for candidate in FORMATS.values():
                if candidate.recognises(row):
                    return candidate, head
        if len(head) == _DETECTION_ROWS:
            break
    if not head or (isinstance(head[0][1], MalformedRecordError) and not skip_malformed):
        # Nothing in it, or a first record that is reported as malformed anyway.
        return FORMATS["requests"], head
    raise _unknown(path, head)


def _unknown(path: str, head: Sequence[NumberedRow]) -> TrafficError:
    """What to say of records none of which any format recognises."""
    several = len(head) > 1
    known = next((row for _, row in head if not isinstance(row, MalformedRecordError)), None)
    if known is None:
        line, error = head[0]
        read = f"none of its first {len(head)} records can be read" if several else "its first record cannot be read"
        remedy = _remedy(error) if isinstance(error, MalformedRecordError) and error.reason == NOT_UTF8 else _GIVE
        return TrafficError(f"{path}: {read} ({error} on line {line})", remedy)
    keys = [key if _FIELD.fullmatch(key) else "..." for key in list(known)[:_SHOWN_KEYS]]
    keys += ["..."] if len(known) > _SHOWN_KEYS else []
    records = f"first {len(head)} records" if several else "first record"
    return TrafficError(
        f"{path}: the format of its {records} is not known (with the keys {', '.join(keys)})",
        f'{_GIVE}, such as {{"messages": [...], "response": "..."}}, or --format with one of {", ".join(FORMATS)}',
    )


def _remedy(error: MalformedRecordError) -> str:
    if error.reason == NOT_UTF8:
        return "it may be Latin-1 or Windows-1252: convert the file, such as with `iconv -f WINDOWS-1252 -t UTF-8`"
    return "mend the line, or skip such lines with --skip-malformed"


def _lengths_only(place: str, kind: Format) -> TrafficError:
    return TrafficError(
        f"{place}: the {kind.name} trace holds lengths without text, and statistics of made-up text mean nothing",
        "give traffic with text; traces of lengths serve `replay` only",
    )
