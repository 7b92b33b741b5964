"""The header reader believes nothing: every lie is an InputFileError, whatever its kind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoint import layer_tensors, safetensors_bytes

from reap_serve.errors import InputFileError
from reap_serve.weight_headers import FileState, parse_header, read_shard


def shard(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_offsets_are_counted_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard({"b": entry(offsets=(4, 8)), "a": entry(), "__metadata__": {"format": "pt"}}, b"aaaabbbb"))
    found = read_shard(path)
    content = path.read_bytes()
    assert [content[each.offset : each.offset + each.num_bytes] for each in found.tensors] == [b"aaaa", b"bbbb"]
    assert [each.name for each in found.tensors] == ["a", "b"]
    assert found.metadata == {"format": "pt"}
    assert found.state.size == len(content)


LIES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length of 2**60": (2**60).to_bytes(8, "little") + b"{}",
    "length beyond the end": (100).to_bytes(8, "little") + b"{}",
    "not JSON": shard(b"hello", b""),
    "not UTF-8": shard(b"\xff\xfe{}", b""),
    "a list": shard([], b""),
    "nested beyond the parser": shard(b"[" * 100_000, b""),
    "a number of 5000 digits": shard(
        b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}', b"aaaa"
    ),
    "a name twice": shard(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b"aaaa",
    ),
    "unknown dtype": shard({"a": entry("Q7")}, b"aaaa"),
    "dtype a list": shard({"a": entry(dtype=[])}, b"aaaa"),  # type: ignore[arg-type]
    "negative shape": shard({"a": entry(shape=(-4,))}, b"aaaa"),
    "shape of 2**60": shard({"a": entry(shape=(2**60,))}, b"aaaa"),
    "shape of booleans": shard({"a": entry(shape=(True, 4))}, b"aaaa"),
    "shape a text": shard({"a": entry(shape="4")}, b"aaaa"),
    "a thousand dimensions": shard({"a": entry(shape=(1,) * 1000, offsets=(0, 1))}, b"a"),
    "offsets beyond the end": shard({"a": entry(shape=(8,), offsets=(0, 8))}, b"aaaa"),
    "offsets reversed": shard({"a": entry(offsets=(4, 0))}, b"aaaa"),
    "offsets negative": shard({"a": entry(offsets=(-4, 0))}, b"aaaa"),
    "offsets of 2**60": shard({"a": entry(offsets=(2**60, 2**60 + 4))}, b"aaaa"),
    "one offset": shard({"a": entry(offsets=(0,))}, b"aaaa"),
    "shape and offsets disagree": shard({"a": entry(shape=(3,))}, b"aaaa"),
    "overlap": shard({"a": entry(), "b": entry(offsets=(2, 6))}, b"aaaabb"),
    "same bytes twice": shard({"a": entry(), "b": entry()}, b"aaaa"),
    "gap": shard({"a": entry(), "b": entry(offsets=(6, 10))}, b"aaaa  bbbb"),
    "gap at the start": shard({"a": entry(offsets=(2, 6))}, b"  aaaa"),
    "bytes at the end": shard({"a": entry()}, b"aaaa!"),
    "truncated data": shard({"a": entry()}, b"aaa"),
    "a field more": shard({"a": {**entry(), "extra": 1}}, b"aaaa"),
    "a field less": shard({"a": {"dtype": "U8", "shape": [4]}}, b"aaaa"),
    "entry a number": shard({"a": 4}, b"aaaa"),
    "name with a slash": shard({"../a": entry()}, b"aaaa"),
    "name with dots": shard({"a..b": entry()}, b"aaaa"),
    "name with a line end": shard({"a\nb": entry()}, b"aaaa"),
    "name empty": shard({"": entry()}, b"aaaa"),
    "name of 2000 letters": shard({"a" * 2000: entry()}, b"aaaa"),
    "metadata not texts": shard({"__metadata__": {"a": 1}, "a": entry()}, b"aaaa"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_in_one_line(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(InputFileError) as caught:
        read_shard(path)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "n" * 300])
def test_a_name_that_no_file_has_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"cannot be (the name of a file|read: File name too long)"):
        read_shard(tmp_path / name)


def test_a_pipe_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputFileError, match="not a regular file"):
        read_shard(tmp_path / "model.safetensors")
    with pytest.raises(InputFileError, match="No such file"):
        read_shard(tmp_path / "absent.safetensors")


WHOLE = safetensors_bytes(layer_tensors(0))
HEADER = WHOLE[8 : 8 + int.from_bytes(WHOLE[:8], "little")]


@given(position=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_is_refused_or_describes_the_file_exactly(position: int, value: int) -> None:
    """Whatever passes, its tensors cover the data once and nothing beyond it."""
    content = bytearray(WHOLE)
    content[position] = value
    length = int.from_bytes(content[:8], "little")
    header = bytes(content[8 : 8 + length])
    try:
        found = parse_header("f", header, FileState(len(content), 0, 0))
    except InputFileError:
        return
    end = 8 + len(header)
    for tensor in found.tensors:
        assert tensor.offset == end
        end += tensor.num_bytes
    assert end == len(content)


@given(cut=st.integers(0, len(HEADER)), insert=st.binary(max_size=8))
@settings(max_examples=300, deadline=None)
def test_a_header_with_foreign_bytes_never_raises_anything_else(cut: int, insert: bytes) -> None:
    header = HEADER[:cut] + insert + HEADER[cut:]
    try:
        parse_header("f", header, FileState(8 + len(header) + len(WHOLE) - 8 - len(HEADER), 0, 0))
    except InputFileError:
        return
