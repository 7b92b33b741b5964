"""Single fields of foreign records: names, counts and times, in the forms in which exporters write them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from reap_serve.records import JsonValue
from reap_serve.slice_name import RULE, is_slice_name
from reap_serve.traffic.malformed import MalformedRecordError


def name(value: JsonValue) -> str | None:
    """A name or number as text; None when absent or empty.

    Raises:
        MalformedRecordError: It is a list, an object or a truth value.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise MalformedRecordError("name is neither text nor a number")


def slice_of(value: JsonValue) -> str | None:
    """The name of a slice; None when absent or empty.

    Raises:
        MalformedRecordError: It breaks the rule for names of slices.
    """
    found = name(value)
    if found is not None and not is_slice_name(found):
        raise MalformedRecordError(f"slice is not {RULE}")
    return found


def count(value: JsonValue) -> int | None:
    """A number of tokens; None when absent.

    Raises:
        MalformedRecordError: It is not a whole number, or negative.
    """
    if value is None or value == "":
        return None
    number = _number(value, "token count")
    if number < 0 or number != int(number):
        raise MalformedRecordError("token count is not a whole number")
    return int(number)


def seconds(value: JsonValue, *, per_second: float = 1.0) -> float | None:
    """A time in seconds; None when absent.

    Args:
        value: A number or its text, in units of `1 / per_second` s.
        per_second: 1000 for milliseconds, 1e9 for nanoseconds.

    Raises:
        MalformedRecordError: It is not a finite number.
    """
    if value is None or value == "":
        return None
    return _number(value, "time") / per_second


def clock_time(value: JsonValue) -> float | None:
    """A time of day in seconds since 1970: a number of seconds, or an ISO 8601 text, UTC where it names no zone.

    Raises:
        MalformedRecordError: It is neither.
    """
    if not isinstance(value, str) or value == "":
        return seconds(value)
    text = value.strip()
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return seconds(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(value: JsonValue, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise MalformedRecordError(f"{what} is not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise MalformedRecordError(f"{what} is not a number") from None
    if not math.isfinite(number):
        raise MalformedRecordError(f"{what} is not a number")
    return number
