"""JSON that is written is JSON: no NaN, no infinity, no half of a surrogate pair outside an escape."""

from __future__ import annotations

import json
import math
from typing import NoReturn

from hypothesis import given
from hypothesis import strategies as st

from reap_serve.records import JsonValue, strict_json

TEXTS = st.text(st.characters(categories=("L", "N", "P", "Cs", "Cc")), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def refuse(constant: str) -> NoReturn:
    raise AssertionError(constant)


def without_nan(value: JsonValue) -> JsonValue:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    return [without_nan(each) for each in value] if isinstance(value, list) else value


@given(VALUES, st.sampled_from([None, 1, 2]))
def test_what_is_written_is_strict_and_read_back(value: JsonValue, indent: int | None) -> None:
    text = strict_json(value, indent=indent).decode("utf-8", errors="strict")
    assert json.loads(text, parse_constant=refuse) == without_nan(value)


def test_infinity_by_hand() -> None:
    assert strict_json({"a": [0.5, float("inf"), -float("inf"), float("nan")], "b": "\xe9"}) == (
        '{"a": [0.5, 1e999, -1e999, null], "b": "\xe9"}\n'.encode()
    )
    assert strict_json(["\ud83d", "\xe9"]) == b'["\\ud83d", "\\u00e9"]\n'
