"""Outputs that are there whole or not at all: written beside their destination, renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from reap_serve.errors import OutputExistsError, StorageError


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuses an output that is already there, before any work is done.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        StorageError: The folder of `path` does not exist and cannot be made.
    """
    if not overwrite and os.path.lexists(path):
        raise OutputExistsError(f"{path} exists already", "give another path or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path.parent} cannot be made: {error.strerror}", "give a path that can be written"
        ) from None


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Writes a file so that `path` holds the old content or the whole new content, also after a crash.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        StorageError: The disk refused.
    """
    with new_file(path, overwrite=overwrite) as handle:
        handle.write(content)


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file to fill, which takes the name `path` only when the block ends without an error.

    Yields:
        A file beside `path`, open for writing; it is removed when the block raises.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        StorageError: The disk refused.
    """
    refuse_existing(path, overwrite)
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        sync_directory(path.parent)
        temporary = None
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", "free space or give another path") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` only when the block ends without an error.

    Yields:
        A directory beside `path`; it is removed when the block raises.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
    """
    refuse_existing(path, overwrite)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield staging
        os.chmod(staging, 0o777 & ~_umask())
        replace_directory(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def replace_directory(staging: Path, path: Path) -> None:
    """Gives a finished directory its name; what stood there before is removed afterwards."""
    retired: Path | None = None
    if os.path.lexists(path):
        retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".retired", dir=path.parent)) / "old"
        os.rename(path, retired)
    os.rename(staging, path)
    sync_directory(path.parent)
    if retired is not None:
        shutil.rmtree(retired.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
