"""Digests of tensors: the same whether the bytes pass while copying or are read again, and in whatever pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoint import read_all, write_checkpoint, write_plan

from reap_serve.prune import digests, run
from reap_serve.prune.beside import write_beside
from reap_serve.prune.checkpoint import read_checkpoint
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.digests import TensorDigests, digest_files
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.manifest import read_manifest
from reap_serve.prune.run import prune

KEPT = {0: [1, 3], 1: [0, 2]}
OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1)


def test_the_digest_is_xxh3() -> None:
    """The value of no bytes is published with the specification of XXH3."""
    found = TensorDigests([("empty", 0), ("a", 1)])
    found.update(b"a")
    assert found.found["empty"] == "2d06800538d394c2"
    assert found.found["a"] == xxhash.xxh3_64_hexdigest(b"a")


@given(st.lists(st.binary(max_size=9), max_size=8), st.lists(st.integers(1, 12), max_size=40))
def test_any_pieces_give_the_digests_of_the_tensors(tensors: list[bytes], cuts: list[int]) -> None:
    found = TensorDigests((str(index), len(data)) for index, data in enumerate(tensors))
    stream, position = b"".join(tensors), 0
    for length in [*cuts, len(stream)]:
        found.update(memoryview(stream)[position : position + length])
        position += length
    assert found.found == {str(index): xxhash.xxh3_64_hexdigest(data) for index, data in enumerate(tensors)}


def test_the_manifest_holds_the_digest_of_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "BUFFER_BYTES", 5)
    source = write_checkpoint(tmp_path / "source")
    prune(str(source), write_plan(tmp_path / "plan.json", KEPT), tmp_path / "out", OPTIONS, overwrite=False)
    expected = {name: xxhash.xxh3_64_hexdigest(data) for name, (_, _, data) in read_all(tmp_path / "out").items()}
    assert read_manifest(tmp_path / "out").digests == expected
    assert digest_files(tmp_path / "out", read_checkpoint(tmp_path / "out").shards, jobs=2) == expected


def test_an_attempt_that_goes_on_later_knows_the_digests_of_finished_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_beside", fail)
    with pytest.raises(KeyboardInterrupt):
        prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False)
    monkeypatch.setattr(run, "write_beside", write_beside)
    result = prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False)
    assert result.bytes_read == 0
    whole = json.loads((tmp_path / "out" / "reap_manifest.json").read_text())["digests"]
    assert whole == {name: xxhash.xxh3_64_hexdigest(data) for name, (_, _, data) in read_all(tmp_path / "out").items()}
