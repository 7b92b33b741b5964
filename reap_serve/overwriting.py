"""What `--overwrite` may remove: a file of the kind that the command writes, or a directory that this program made.

What the command reads is never removed. A directory is removed with all that is in it. So one is ours only when it is
empty or holds a file that says so, and a directory in which somebody lives or works is never touched.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from reap_serve.errors import OutputExistsError, RequestError
from reap_serve.file_kinds import FileKind

# Written into each directory that holds nothing else by which it could be told.
MARKER = ".reap-serve"
MANIFEST = "reap_manifest.json"
REPORTS = ("report.json", "demo.json")
MAX_REPORT_BYTES = 64 << 20
# As an input and as an output.
STANDARD_STREAM = "-"


def is_stream(path: Path) -> bool:
    """Whether a path is written to and never replaced: a device such as /dev/full, a pipe, a descriptor's name.

    Raises:
        RequestError: It is a disk or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return descriptor_of(path) is not None
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise RequestError(f"{path} is a {'disk' if stat.S_ISBLK(mode) else 'socket'}", "give another path")
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or descriptor_of(path) is not None


def descriptor_of(path: Path) -> int | None:
    """The open descriptor that an output names: 1 for -, /dev/stdout and /dev/fd/1; None for other paths."""
    text = os.path.normpath(path)
    names = {STANDARD_STREAM: 1, "/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    if text in names:
        return names[text]
    folder, _, name = text.rpartition("/")
    if folder in ("/dev/fd", "/proc/self/fd", f"/proc/{os.getpid()}/fd") and name.isascii() and name.isdigit():
        return int(name)
    return None


def is_stdout(path: Path) -> bool:
    """Whether an output is what standard output is, by its name or as the same file."""
    try:
        return descriptor_of(path) == 1 or os.path.samestat(path.stat(), os.fstat(1))
    except (OSError, ValueError):
        return False


def require_no_input(path: Path, inputs: Iterable[str | Path]) -> None:
    """Refuses an output that the command reads, or a directory with such a file in it.

    Args:
        path: The output.
        inputs: Paths; what is none, such as a hub id, is passed over. `-` is standard input.

    Raises:
        OutputExistsError: With the input that it is.
    """
    if not os.path.lexists(path):
        return
    for given in inputs:
        source = Path("/dev/stdin" if str(given) == STANDARD_STREAM else given)
        try:
            same = os.path.samefile(path, source)
            inside = path.is_dir() and source.resolve().is_relative_to(path.resolve())
        except (OSError, ValueError):
            continue
        if same or inside:
            what = "is read by" if str(path) == str(given) else f"{'is' if same else 'holds'} {given}, an input of"
            raise OutputExistsError(f"the output {path} {what} this command", "give another path")


def require_replaceable_file(path: Path, kind: FileKind | None = None) -> None:
    """Refuses to put a file where a directory or a file of another kind is.

    Args:
        path: The output.
        kind: What is written; None for files of the program's own state.

    Raises:
        OutputExistsError: `path` is a directory, or holds something and is not of the kind.
    """
    if path.is_dir() and not path.is_symlink():
        raise OutputExistsError(f"{path} is a directory, and the output is a file", "give another path")
    if kind is None or not path.is_file():
        return
    try:
        with path.open("rb") as file:
            replaceable = not os.fstat(file.fileno()).st_size or kind.matches(file)
    except OSError:
        replaceable = False
    if not replaceable:
        raise not_of_kind(path, kind)


def not_of_kind(path: Path | str, kind: FileKind) -> OutputExistsError:
    """The error of an output that `--overwrite` does not replace."""
    return OutputExistsError(
        f"{path} is not {kind.name}, and --overwrite replaces only what this command writes",
        "give another path, or remove it yourself",
    )


def require_replaceable_directory(path: Path) -> None:
    """Refuses to remove a directory that this program did not make.

    Raises:
        OutputExistsError: `path` is a file, a directory of others, or one that is in use.
    """
    if descriptor_of(path) is not None:
        raise OutputExistsError(f"{path} is a stream, and the output is a directory", "give the path of a directory")
    if not path.is_dir():
        if os.path.lexists(path) and not path.is_symlink():
            raise OutputExistsError(f"{path} is a file, and the output is a directory", "give another path")
        return
    resolved = path.resolve()
    for what, lived_in in (
        ("your home directory", Path(os.path.expanduser("~"))),
        ("the working directory", Path.cwd()),
    ):
        if lived_in.resolve().is_relative_to(resolved):
            raise OutputExistsError(f"{path} is {what} or holds it", "give another path")
    if os.path.ismount(path):
        raise OutputExistsError(f"{path} is a mount point, which cannot be replaced", "give a path below it")
    if not is_ours(path):
        raise OutputExistsError(
            f"{path} holds files and nothing that tells it was made by reap-serve",
            "give another path, or remove it yourself",
        )


def is_ours(directory: Path) -> bool:
    """Whether this program made a directory: it is empty, or our marker, manifest or report is in it."""
    if not any(directory.iterdir()):
        return True
    if any((directory / name).is_file() for name in (MARKER, MANIFEST)):
        return True
    return any(_is_our_report(directory / name) for name in REPORTS)


def _is_our_report(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > MAX_REPORT_BYTES:
            return False
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    made = document.get("provenance") if isinstance(document, dict) else None
    return isinstance(made, dict) and str(made.get("tool")).startswith("reap-serve ")
