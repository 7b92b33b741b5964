"""The patches, and copies of the installed vLLM with patches applied; the installed one is only read."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

PATCHES = Path(__file__).parents[3] / "patches"
# A folder that holds the `vllm` of an unpacked wheel, which need not run here.
SOURCES_VARIABLE = "REAP_SERVE_VLLM_SOURCES"


def installed() -> Path:
    """The folder that holds the installed `vllm`."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def _release_of(folder: Path) -> str:
    """Major and minor version of the vLLM that a folder holds."""
    names = [path.name for path in folder.glob("vllm*.dist-info") if re.match(r"vllm(_cpu)?-\d", path.name)]
    assert len(names) == 1, names
    return ".".join(names[0].split("-")[1].split(".")[:2])


RELEASE = PATCHES / f"vllm-{_release_of(installed())}"


def sources_of(release: Path) -> Path | None:
    """The folder that holds the `vllm` that a folder of patches is for; None where it lies nowhere here."""
    folders = [installed(), *(Path(folder) for folder in [os.environ.get(SOURCES_VARIABLE)] if folder)]
    return next((folder for folder in folders if release.name == f"vllm-{_release_of(folder)}"), None)


def touched(patch: Path) -> list[str]:
    """Paths that a patch changes, below the folder that holds `vllm`."""
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(), flags=re.MULTILINE)


def header(patch: Path) -> dict[str, str]:
    """Fields of a patch's header; a line that begins with two spaces goes on with the field above."""
    text = re.split(r"^--- ", patch.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.sub(r"\n  (?=\S)", " ", text).splitlines()
    return dict(line.split(": ", 1) for line in lines if line)


def apply(patch: Path, folder: Path) -> None:
    """Applies a patch without fuzz: a hunk that only nearly fits is an error."""
    with patch.open("rb") as content:
        command = ["patch", "-p1", "--fuzz=0", "--force", "--directory", str(folder)]
        run = subprocess.run(command, stdin=content, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "offset" not in run.stdout, run.stdout


def patched_files(patch: Path, folder: Path, sources: Path | None = None) -> Path:
    """Copies the files that a patch touches to `folder` and applies it; gives `folder`.

    They come from the installed vLLM, or from the folder `sources`.
    """
    for name in touched(patch):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile((sources or installed()) / name, folder / name)
    apply(patch, folder)
    return folder


def patched_package(patches: Sequence[Path], folder: Path) -> Path:
    """A whole `vllm` in `folder` whose untouched files are links to the installed ones, with patches applied.

    Gives `folder`, to stand first on PYTHONPATH.
    """
    files = {name for patch in patches for name in touched(patch)}
    folders = {parent.as_posix() for name in files for parent in Path(name).parents} - {"."}
    for name in sorted(folders):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for entry in (installed() / name).iterdir():
            below = f"{name}/{entry.name}"
            if below in files:
                shutil.copyfile(entry, folder / below)
            elif below not in folders and entry.name != "__pycache__":
                (folder / below).symlink_to(entry)
    for patch in patches:
        apply(patch, folder)
    return folder
