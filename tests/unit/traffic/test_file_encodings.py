"""Encodings, compression and archives: read, or refused by the name of what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from traffic_records import batch

from reap_serve.errors import InputFileError, TrafficError
from reap_serve.traffic.malformed import Malformed
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.source import open_source

ASK = "Wie alt ist die Brücke? 😀"
TEXT = json.dumps(batch([{"role": "user", "content": ASK}]), ensure_ascii=False) + "\n"


def archive(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in files.items():
            file.writestr(name.replace("_", "."), text)
    return content.getvalue()


def asked(path: Path, content: bytes) -> list[object]:
    file = path / "traffic"
    file.write_bytes(content)
    return [request.body["messages"][0]["content"] for request in read_traffic([str(file)]) if request.body]  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.encode("utf-8-sig"),
        bz2.compress(TEXT.encode()),
        lzma.compress(TEXT.encode()),
        gzip.compress(TEXT.encode("utf-16")),
        archive(a_jsonl=TEXT.encode()),
        archive(a_json=TEXT.encode("utf-16")),
        archive(a_gz=gzip.compress(TEXT.encode())),
    ],
)
def test_read(content: bytes, tmp_path: Path) -> None:
    assert asked(tmp_path, content) == [ASK]


def test_files_of_an_archive_follow_each_other(tmp_path: Path) -> None:
    # The first without a line break at its end.
    assert asked(tmp_path, archive(a_jsonl=TEXT.rstrip().encode(), b_jsonl=TEXT.encode())) == [ASK, ASK]


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"PAR1" + bytes(range(256)) + b"PAR1", "a Parquet file"),
        (b"ARROW1\x00\x00" + bytes(64), "an Arrow file"),
        (b"SQLite format 3\x00" + bytes(64), "an SQLite database"),
        (tar(), "a tar archive"),
        (gzip.compress(tar()), "a tar archive"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(64), "a 7z archive"),
        (archive(a_jsonl=b"{}", b_txt=b""), "zip archive of 2 files"),
        (archive(word_xml=b"<a/>"), "an office document"),
        (archive(), "an empty zip archive"),
        (archive(a_jsonl=TEXT.encode() * 9)[:120], "zip archive that is truncated"),
        (bz2.compress(TEXT.encode())[:-9], "truncated or corrupt"),
        (lzma.compress(TEXT.encode())[:-9], "truncated or corrupt"),
        (TEXT.encode("utf-16")[:-1], "is not whole as UTF-16"),
        (b"\x00\x01\x02\x03" * 64, "a binary file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ],
)
def test_refused_by_name(content: bytes, named: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=named) as caught:
        asked(tmp_path, content)
    assert "mend the line" not in str(caught.value)


def test_another_encoding_of_letters(tmp_path: Path) -> None:
    line = TEXT.replace("😀", "").encode("latin-1")
    with pytest.raises(TrafficError, match=r":1: not UTF-8; it may be Latin-1") as caught:
        asked(tmp_path, line)
    assert "mend the line" not in str(caught.value)
    malformed = Malformed()
    file = tmp_path / "both"
    file.write_bytes(TEXT.encode() + line)
    assert len(list(read_traffic([str(file)], skip_malformed=True, malformed=malformed))) == 1
    assert malformed.counts == {"not UTF-8": 1}


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_the_bytes_of_a_file_are_told_as_they_are_read(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Those on the disk, each once, so that their sum is the size of the file."""
    path, told = tmp_path / "traffic", list[int]()
    path.write_bytes(compress(b"".join(b"%d\n" % number for number in range(500_000))))
    with open_source(str(path), told.append) as stream:
        for number, _ in enumerate(stream):
            if number == 0:
                assert 0 < sum(told) < path.stat().st_size
    assert sum(told) == path.stat().st_size
