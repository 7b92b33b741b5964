"""The scanner finds the objects of a document, however it is indented and wherever it is cut into chunks."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from reap_serve.traffic.json_objects import ObjectScanner
from reap_serve.traffic.malformed import MalformedRecordError

keys = st.text(alphabet='k"\\{]', max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\{}[],: \n', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(keys, values, max_size=3)


def scan(document: bytes, chunk_bytes: int, *, in_array: bool) -> list[tuple[int, object]]:
    scanner = ObjectScanner(in_array=in_array, max_bytes=1 << 20)
    found: list[tuple[int, object]] = []
    for start in range(0, len(document), chunk_bytes):
        for number, item in scanner.feed(document[start : start + chunk_bytes]):
            found.append((number, item if isinstance(item, MalformedRecordError) else json.loads(item)))
    return [*found, *scanner.close()]


@given(
    items=st.lists(objects, max_size=4),
    chunk_bytes=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    in_array=st.booleans(),
)
def test_objects_are_found_in_any_chunks(
    items: list[dict[str, object]], chunk_bytes: int, indent: int | None, in_array: bool
) -> None:
    if in_array:
        document = json.dumps(items, indent=indent)
    else:
        document = "\n".join(json.dumps(item, indent=indent) for item in items)
    found = scan(document.encode(), chunk_bytes, in_array=in_array)
    assert [item for _, item in found] == items


def test_lines_and_errors() -> None:
    document = b'[\n  {"a": 1},\n  garbage,\n  {"b": "\\\\"}\n]\n'
    found = scan(document, 7, in_array=True)
    assert [(number, str(item)) for number, item in found] == [
        (2, "{'a': 1}"),
        (3, "not JSON"),
        (4, "{'b': '\\\\'}"),
    ]


def test_document_that_breaks_off() -> None:
    for document in (b'[{"a": 1}', b'[{"a": 1}, {"b"', b"["):
        (*_, (_, last)) = scan(document, 64, in_array=True)
        assert str(last) == "file ends inside a JSON value"
