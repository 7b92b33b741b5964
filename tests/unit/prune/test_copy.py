"""Bytes arrive as they are, and a witness sees each on its way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reap_serve.errors import StorageError
from reap_serve.prune import copy
from reap_serve.prune.copy import Copier

RUNS = [(5, 300_000), (400_000, 10), (700_000, 299_995), (0, 1)]


def copied(folder: Path, runs: list[tuple[int, int]]) -> tuple[bytes, int]:
    """Appends runs of a megabyte of noise after a header of three bytes."""
    source, destination = os.open(folder / "in", os.O_RDONLY), os.open(folder / "out", os.O_RDWR | os.O_CREAT)
    seen = bytearray()
    try:
        os.write(destination, b"hdr")
        copier = Copier(source, destination, 3, seen.extend)
        steps = sum(copier.append(runs))
        assert copier.position == 3 + steps
        content = (folder / "out").read_bytes()
        assert content[3:] == seen
        return content, steps
    finally:
        os.close(source)
        os.close(destination)


@pytest.fixture
def noise(tmp_path: Path) -> bytes:
    content = os.urandom(1_000_000)
    (tmp_path / "in").write_bytes(content)
    return content


def expected(noise: bytes) -> bytes:
    return b"hdr" + b"".join(noise[offset : offset + length] for offset, length in RUNS)


def test_bytes_arrive_and_are_seen_in_order(noise: bytes, tmp_path: Path) -> None:
    content, steps = copied(tmp_path, RUNS)
    assert content == expected(noise)
    assert steps == sum(length for _, length in RUNS)


def test_short_writes_and_a_small_buffer_are_continued(
    noise: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    monkeypatch.setattr(copy, "BUFFER_BYTES", 777)
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: write(file, content[:100], offset))
    assert copied(tmp_path, RUNS)[0] == expected(noise)


def test_bytes_of_another_origin_stand_between(noise: bytes, tmp_path: Path) -> None:
    source, destination = os.open(tmp_path / "in", os.O_RDONLY), os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    copier = Copier(source, destination, 0)
    for _ in copier.append([(0, 5)]):
        pass
    copier.write(b"between")
    for _ in copier.append([(9, 2)]):
        pass
    os.close(source)
    os.close(destination)
    assert (tmp_path / "out").read_bytes() == noise[:5] + b"between" + noise[9:11]


def test_a_source_that_ends_early_is_noticed(noise: bytes, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ended at byte 1000000"):
        copied(tmp_path, [(500_000, 600_000)])
