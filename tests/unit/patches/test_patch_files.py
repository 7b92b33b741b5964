"""Every patch says why it is there and when it goes, stands in the index, and fits the vLLM of its release.

Those of a release that is neither installed nor unpacked (`REAP_SERVE_VLLM_SOURCES`) are only read.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from patched_vllm import PATCHES, RELEASE, header, patched_files, sources_of, touched

from reap_serve.adapter.releases.check import RELEASES

FOLDERS = [PATCHES.parent / release.patches for release in RELEASES.values()]
ALL = [path for folder in FOLDERS for path in sorted(folder.glob("*"))]
FIELDS = ["Target", "Why", "How", "Upstream", "Remove-when", "Test"]


@pytest.fixture(params=ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def patch(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


@pytest.fixture
def sources(patch: Path) -> Path:
    """The folder that holds the vLLM of the patch's release."""
    folder = sources_of(patch.parent)
    if folder is None:
        pytest.skip(f"{patch.parent.name} is not here")
    return folder


def test_every_release_has_a_folder() -> None:
    assert sorted(path for path in PATCHES.iterdir() if path.is_dir()) == FOLDERS
    assert RELEASE in FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_numbers_are_consecutive_and_files_are_touched_once(folder: Path) -> None:
    files = sorted(folder.glob("*"))
    assert [int(path.name[:4]) for path in files] == list(range(1, len(files) + 1))
    assert all(re.fullmatch(r"\d{4}-[a-z0-9-]+\.patch", path.name) for path in files)
    names = [name for path in files for name in touched(path)]
    assert len(names) == len(set(names))


def test_the_index_is_complete() -> None:
    linked = re.findall(r"\((vllm-[\d.]+/[\w.-]+)\)", (PATCHES / "README.md").read_text())
    assert len(linked) == len(set(linked))
    assert sorted(linked) == [path.relative_to(PATCHES).as_posix() for path in ALL]


def test_the_target_is_of_the_folders_release(patch: Path) -> None:
    named = set(re.findall(r"(?<![\d.])0\.\d+(?![\d.])", header(patch)["Target"]))
    assert named == {patch.parent.name.removeprefix("vllm-")}


def test_the_header_is_complete(patch: Path) -> None:
    fields = header(patch)
    assert list(fields) == FIELDS
    assert all(fields.values())
    assert all(name in fields["Target"] for name in touched(patch))
    for test in fields["Test"].split(", "):
        assert (PATCHES.parent / test).is_file(), test


def test_it_applies_to_a_copy_and_leaves_valid_python(patch: Path, sources: Path, tmp_path: Path) -> None:
    assert touched(patch)
    folder = patched_files(patch, tmp_path, sources)
    for name in touched(patch):
        ast.parse((folder / name).read_text())


def test_it_comes_out_again(patch: Path, sources: Path, tmp_path: Path) -> None:
    folder = patched_files(patch, tmp_path, sources)
    command = ["patch", "-p1", "--reverse", "--force", "--directory", str(folder)]
    subprocess.run(command, input=patch.read_bytes(), check=True, capture_output=True)
    assert all((folder / name).read_bytes() == (sources / name).read_bytes() for name in touched(patch))
