"""Outputs are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from reap_serve.errors import OutputExistsError, StorageError
from reap_serve.publish import new_directory, refuse_existing, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "plan.json", b"{}", overwrite=False)
    assert (tmp_path / "plan.json").read_bytes() == b"{}"
    assert names(tmp_path) == ["plan.json"]


def test_an_existing_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"old")
    with pytest.raises(OutputExistsError, match="exists already; give another path or --overwrite"):
        write_file(tmp_path / "plan.json", b"new", overwrite=False)
    assert (tmp_path / "plan.json").read_bytes() == b"old"
    write_file(tmp_path / "plan.json", b"new", overwrite=True)
    assert (tmp_path / "plan.json").read_bytes() == b"new"


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        refuse_existing(tmp_path / "out", overwrite=False)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be made"):
        refuse_existing(tmp_path / "file" / "sub" / "out", overwrite=False)


def test_a_directory_takes_its_name_only_when_it_is_finished(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out", overwrite=False) as staging:
        (staging / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def test_a_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")

    def fill() -> None:
        with new_directory(tmp_path / "out", overwrite=True) as staging:
            (staging / "new").write_text("2")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fill()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_a_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with new_directory(tmp_path / "out", overwrite=True) as staging:
        (staging / "new").write_text("2")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]
