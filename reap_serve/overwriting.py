"""What `--overwrite` may remove: a file, or a directory that this program made.

A directory is removed with all that is in it. So one is ours only when it is empty or holds a file that says so, and a
directory in which somebody lives or works is never touched.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from reap_serve.errors import OutputExistsError, RequestError

# Written into each directory that holds nothing else by which it could be told.
MARKER = ".reap-serve"
MANIFEST = "reap_manifest.json"
REPORTS = ("report.json", "demo.json")
MAX_REPORT_BYTES = 64 << 20


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
    """The open descriptor that a path names, such as 1 for /dev/stdout and /dev/fd/1; None for other paths."""
    text = os.path.normpath(path)
    names = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    if text in names:
        return names[text]
    folder, _, name = text.rpartition("/")
    if folder in ("/dev/fd", "/proc/self/fd", f"/proc/{os.getpid()}/fd") and name.isascii() and name.isdigit():
        return int(name)
    return None


def require_replaceable_file(path: Path) -> None:
    """Refuses to put a file where a directory is.

    Raises:
        OutputExistsError: `path` is a directory.
    """
    if path.is_dir() and not path.is_symlink():
        raise OutputExistsError(f"{path} is a directory, and the output is a file", "give another path")


def require_replaceable_directory(path: Path) -> None:
    """Refuses to remove a directory that this program did not make.

    Raises:
        OutputExistsError: `path` is a file, a directory of others, or one that is in use.
    """
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
