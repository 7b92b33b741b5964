"""Which statistics belong to a stretch of time: `--since 7d` chooses files by the end of their windows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from reap_serve.errors import RequestError
from reap_serve.statistics.layout import read_layout
from reap_serve.statistics.record import Header, Window
from reap_serve.statistics.storage import open_source

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_duration(text: str) -> timedelta:
    """A duration such as `90s`, `30m`, `12h`, `7d` or `2w`.

    Raises:
        RequestError: It is not of that form, or not above 0.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match["number"]) * _SECONDS[match["unit"]] if match else 0.0
    if not 0 < seconds < timedelta.max.total_seconds():
        raise RequestError(f"{text!r} is no duration", "write a number and one of s, m, h, d, w, such as 7d")
    return timedelta(seconds=seconds)


def ended(window: Window) -> datetime:
    """When a window ended, in UTC; a time without a zone is UTC.

    Raises:
        RequestError: The window's time is not ISO 8601.
    """
    try:
        moment = datetime.fromisoformat(window.ended)
    except ValueError:
        raise RequestError(
            f"window {window.id} ended at {window.ended!r}, which is no time", "leave its file out"
        ) from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Selection:
    """Statistics files by age.

    Attributes:
        paths: Files with a window that ended inside the stretch, in the order given.
        headers: Theirs.
        older: Files whose windows had all ended before.
    """

    paths: tuple[str, ...]
    headers: tuple[Header, ...]
    older: tuple[str, ...]


def select_since(paths: Iterable[str], since: str, now: datetime | None = None) -> Selection:
    """The files that hold what was observed since then, judged by their headers alone.

    A merged file is taken as a whole when its last window is inside: its sums cannot be parted again.

    Args:
        paths: Statistics files; directories are expanded before.
        since: Length of the stretch that ends now, see `parse_duration`.
        now: The end of the stretch, with a zone; the present by default.

    Raises:
        InputFileError: A file is missing or unsound.
        RequestError: `since` is no duration.
    """
    begin = (now or datetime.now(UTC)) - parse_duration(since)
    taken: list[tuple[str, Header]] = []
    older: list[str] = []
    for path in paths:
        with open_source(path) as (handle, size):
            header = read_layout(handle, size, path).header
        if max(map(ended, header.windows)) > begin:
            taken.append((path, header))
        else:
            older.append(path)
    return Selection(tuple(path for path, _ in taken), tuple(header for _, header in taken), tuple(older))


def require_any(selection: Selection, since: str) -> Selection:
    """The selection, unless it is empty.

    Raises:
        RequestError: Every file is older.
    """
    if not selection.paths:
        raise RequestError(
            f"all {len(selection.older)} statistics files ended more than {since} ago", "give a longer --since"
        )
    return selection
