"""Reading: compression, containers, malformed records, slices, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from reap_serve.errors import InputFileError, TrafficError
from reap_serve.traffic import rows
from reap_serve.traffic.malformed import Malformed
from reap_serve.traffic.read import parse_slices, read_traffic


def line(text: str, slice_name: str | None = None) -> str:
    body: dict[str, object] = {"messages": [{"role": "user", "content": text}]}
    if slice_name is not None:
        body["metadata"] = {"reap_slice": slice_name}
    return json.dumps({"custom_id": text, "method": "POST", "url": "/v1/chat/completions", "body": body})


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def ids(*paths: str, **options: object) -> list[str | None]:
    return [request.id for request in read_traffic(paths, **options)]  # type: ignore[arg-type]


LINES = "".join(f"{line(str(number))}\n" for number in range(3))


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        gzip.compress(LINES.encode()),
        gzip.compress(LINES[:100].encode()) + gzip.compress(LINES[100:].encode()),
        zstandard.compress(LINES.encode()),
        zstandard.compress(LINES[:100].encode()) + zstandard.compress(LINES[100:].encode()),
        b"\xef\xbb\xbf" + LINES.encode(),
        LINES.replace("\n", "\r\n\r\n").encode(),
        LINES.rstrip().encode(),
        json.dumps([json.loads(text) for text in LINES.splitlines()]).encode(),
        json.dumps([json.loads(text) for text in LINES.splitlines()], indent=4).encode(),
        "\n".join(json.dumps(json.loads(text), indent=2) for text in LINES.splitlines()).encode(),
    ],
)
def test_containers_and_compression(tmp_path: Path, content: bytes) -> None:
    assert ids(written(tmp_path / "traffic", content)) == ["0", "1", "2"]


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(gzip.compress(LINES.encode())))))
    assert ids("-") == ["0", "1", "2"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_truncated_compression_is_an_error(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    content = compress(LINES.encode())
    path = written(tmp_path / "traffic", content[:-1])
    with pytest.raises(InputFileError, match="truncated or corrupt"):
        ids(path)


def test_missing_file_is_found_before_any_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="does not exist"):
        read_traffic([written(tmp_path / "here", LINES), str(tmp_path / "absent")])


def test_malformed_line_stops_with_its_number(tmp_path: Path) -> None:
    path = written(tmp_path / "traffic", f"{line('0')}\n\n{{broken\n{line('1')}\n")
    with pytest.raises(TrafficError, match=r"traffic:3: not JSON") as caught:
        ids(path)
    assert caught.value.exit_code == 2


def test_malformed_lines_are_counted_by_reason(tmp_path: Path) -> None:
    broken = [
        "{broken",
        "[1]",
        '{"custom_id": "e", "url": "/v1/embeddings", "body": {"input": "x"}}',
        '{"custom_id": "e", "url": "/v1/embeddings", "body": {"input": "y"}}',
        '{"custom_id": "e", "url": "/v1/chat/completions", "body": {"messages": [{"content": "x"}]}}',
        '{"custom_id": "o", "response": {"status_code": 200, "body": {}}}',
        '{"custom_id": "n", "url": "/v1/completions", "body": {"prompt": ["a", "b"]}}',
    ]
    malformed = Malformed()
    path = written(tmp_path / "traffic", "\n".join([*broken[:3], line("0"), *broken[3:], line("1")]))
    assert ids(path, skip_malformed=True, malformed=malformed) == ["0", "1"]
    assert malformed.counts == {
        "not JSON": 1,
        "not a JSON object": 1,
        "endpoint embeddings is neither chat nor completion": 2,
        "message without a role": 1,
        "output of a batch without its input": 1,
        "prompt holds several prompts": 1,
    }
    assert malformed.total == 7
    assert malformed.first["endpoint embeddings is neither chat nor completion"] == f"{path}:3"


def test_errors_quote_nothing_of_the_traffic(tmp_path: Path) -> None:
    path = written(tmp_path / "traffic", '{"messages": [{"role": "user", "content": {"SECRET": "SECRET"}}]}\n')
    with pytest.raises(TrafficError) as caught:
        ids(path)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "\n\n", "[]", "{}\n", "nothing\n", "a,b\n1,2\n", '{"a": 1}\n' * 100, "[[1, 2], 3]"]
)
def test_nothing_to_read_is_an_error(tmp_path: Path, content: str) -> None:
    path = written(tmp_path / "traffic", content)
    for skip_malformed in (False, True):
        with pytest.raises(TrafficError):
            ids(path, skip_malformed=skip_malformed)


def test_given_format_is_used(tmp_path: Path) -> None:
    path = written(tmp_path / "traffic", '{"prompt": "x", "timestamp": 5}\n')
    (found,) = read_traffic([path], format="requests")
    assert found.origin.format == "requests"
    with pytest.raises(TrafficError, match="openai-batch, "):
        read_traffic([path], format="parquet")


def test_length_only_traces_are_refused_for_statistics(tmp_path: Path) -> None:
    path = written(tmp_path / "azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,4\n")
    for skip_malformed in (False, True):
        with pytest.raises(TrafficError, match="lengths without text"):
            ids(path, skip_malformed=skip_malformed)
    assert len(ids(path, require_text=False)) == 1


def test_mooncake_is_judged_by_its_records(tmp_path: Path) -> None:
    content = '{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": []}\n'
    with pytest.raises(TrafficError, match=r":1: the mooncake trace holds lengths without text"):
        ids(written(tmp_path / "lengths", content))
    malformed = Malformed()
    path = written(tmp_path / "both", content + '{"timestamp": 5, "prompt": "x"}\n')
    assert ids(path, skip_malformed=True, malformed=malformed) == ["2"]
    assert malformed.counts == {"no text was recorded": 1}


def test_slices(tmp_path: Path) -> None:
    named = written(tmp_path / "named", f"{line('0')}\n{line('1', 'own')}\n")
    other = written(tmp_path / "other", f"{line('2')}\n")
    extra = written(tmp_path / "extra", f"{line('3')}\n")
    slices = parse_slices([f"code={named}", f"code={extra}"])
    found = {request.id: request.slice for request in read_traffic([named, other], slices=slices)}
    # A body's own slice comes first; files that stand only in --slice are read as well.
    assert found == {"0": "code", "1": "own", "2": "default", "3": "code"}


@pytest.mark.parametrize("option", ["code", "=file", "code="])
def test_slice_option_is_checked(option: str) -> None:
    with pytest.raises(TrafficError, match="NAME=FILE"):
        parse_slices([option])


def test_one_file_in_two_slices_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a", LINES)
    with pytest.raises(TrafficError, match="a and b"):
        read_traffic([path], slices={"a": path, "b": path})


@pytest.mark.parametrize("in_array", [False, True])
def test_long_records_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_array: bool) -> None:
    monkeypatch.setattr(rows, "MAX_RECORD_BYTES", 1000)
    parts = [line("0"), line("x" * 5000), line("1")]
    content = f"[{','.join(parts)}]" if in_array else "\n".join(parts)
    malformed = Malformed()
    path = written(tmp_path / "traffic", content)
    assert ids(path, skip_malformed=True, malformed=malformed) == ["0", "1"]
    assert malformed.total == 1
