"""Unfinished outputs of runs that were killed: the next run of the same output removes them.

A run holds a lock on what it writes, which ends with the process however it ends. What lies beside an output under the
name of an unfinished one and is not locked belongs to nobody.

The lock is on the output itself, file or directory, by `flock`: filelock, which this project uses elsewhere, needs a
lock file of its own, and that would be one more thing that a killed run leaves behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path

PARTIAL, RETIRED = ".partial", ".retired"
# File systems take names of 255 bytes, of which a temporary one needs some for itself.
MAX_PREFIX_BYTES = 200
# What `tempfile` puts between prefix and suffix.
_RANDOM = "[a-z0-9_]{8}"


def temporary_prefix(path: Path) -> str:
    """How the temporary neighbours of a path begin; a long name is cut, since what is added to it must fit too."""
    return f".{os.fsdecode(os.fsencode(path.name)[:MAX_PREFIX_BYTES])}."


def hold(descriptor: int) -> None:
    """Marks an open file or directory as being written by this process."""
    # A file system without locks: nothing is held, and `remove_leftovers` removes nothing there either.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(path: Path) -> None:
    """Removes what killed runs left beside an output; puts back an old output that was set aside and not replaced."""
    pattern = re.compile(f"{re.escape(temporary_prefix(path))}{_RANDOM}({re.escape(PARTIAL)}|{re.escape(RETIRED)})")
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    for name in sorted(names):
        if pattern.fullmatch(name):
            # What cannot be removed is left to the user: the output itself does not depend on it.
            with contextlib.suppress(OSError):
                _remove(path.parent / name, path)


def _remove(leftover: Path, path: Path) -> None:
    descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old = leftover / "old"
        if leftover.name.endswith(RETIRED) and os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    finally:
        os.close(descriptor)
