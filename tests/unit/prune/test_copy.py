"""Bytes arrive the same whichever way the system moves them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from reap_serve.errors import StorageError
from reap_serve.prune import copy
from reap_serve.prune.copy import Copier

RUNS = [(5, 300_000), (400_000, 10), (700_000, 299_995), (0, 1)]


def copied(folder: Path, runs: list[tuple[int, int]], *, in_kernel: bool = True) -> tuple[bytes, int]:
    """Appends runs of a megabyte of noise after a header of three bytes."""
    source, destination = os.open(folder / "in", os.O_RDONLY), os.open(folder / "out", os.O_RDWR | os.O_CREAT)
    try:
        os.write(destination, b"hdr")
        copier = Copier(source, destination, 3, in_kernel=in_kernel)
        steps = sum(copier.append(runs))
        assert copier.position == 3 + steps
        return (folder / "out").read_bytes(), steps
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


@pytest.mark.parametrize("in_kernel", [True, False])
def test_both_ways_give_the_same_bytes(in_kernel: bool, noise: bytes, tmp_path: Path) -> None:
    content, steps = copied(tmp_path, RUNS, in_kernel=in_kernel)
    assert content == expected(noise)
    assert steps == sum(length for _, length in RUNS)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_kernel_that_cannot_falls_back(
    code: int, noise: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert copied(tmp_path, RUNS)[0] == expected(noise)


def test_a_disk_error_in_the_kernel_is_not_hidden(
    noise: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(OSError, match="Input/output"):
        copied(tmp_path, RUNS)


def test_short_copies_and_a_small_buffer_are_continued(
    noise: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "BUFFER_BYTES", 777)
    monkeypatch.setattr(copy, "KERNEL_CHUNK_BYTES", 4099)
    assert copied(tmp_path, RUNS)[0] == expected(noise)


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_source_that_ends_early_is_noticed(in_kernel: bool, noise: bytes, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ended at byte 1000000"):
        copied(tmp_path, [(500_000, 600_000)], in_kernel=in_kernel)
