"""Outputs that are there whole or not at all: written beside their destination, renamed into place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from reap_serve import __version__
from reap_serve.errors import OutputExistsError, StorageError
from reap_serve.file_kinds import FileKind
from reap_serve.leftovers import PARTIAL, RETIRED, hold, remove_leftovers, temporary_prefix
from reap_serve.overwriting import (
    MARKER,
    descriptor_of,
    is_ours,
    is_stream,
    require_no_input,
    require_replaceable_directory,
    require_replaceable_file,
)


def refuse_existing(
    path: Path, overwrite: bool, kind: FileKind | None = None, inputs: Iterable[str | Path] = ()
) -> None:
    """Refuses an output file that is already there, before any work is done.

    Args:
        path: The output.
        overwrite: Whether it may be replaced.
        kind: What the command writes; a file of another kind is not replaced. None replaces any file.
        inputs: What the command reads.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, it is one of the inputs, a directory, or of another
            kind.
        RequestError: It is a disk or a socket.
        StorageError: The folder of `path` cannot be made or written to.
    """
    if is_stream(path):
        return
    require_no_input(path, inputs)
    _refuse(path, overwrite)
    require_replaceable_file(path, kind)


def refuse_existing_directory(path: Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Refuses an output directory that is already there, before any work is done.

    Args:
        path: The output.
        overwrite: Whether it may be replaced.
        inputs: What the command reads.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, it is or holds one of the inputs, or it is not ours
            to remove.
        StorageError: The folder of `path` cannot be made or written to.
    """
    require_no_input(path, inputs)
    _refuse(path, overwrite)
    require_replaceable_directory(path)


def _refuse(path: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(path):
        raise OutputExistsError(f"{path} exists already", "give another path or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(path.parent, error, "made") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        read_only = os.statvfs(path.parent).f_flag & os.ST_RDONLY
        raise not_written(path, OSError(errno.EROFS if read_only else errno.EACCES, ""), "written")


def not_written(path: Path, error: OSError, done: str = "written") -> StorageError:
    """The error of an output that the operating system refuses, with what helps against the reason."""
    if error.errno == errno.EROFS:
        return StorageError(f"{path} cannot be {done}: its file system is read-only", "give a path that can be written")
    if error.errno in (errno.EACCES, errno.EPERM):
        return StorageError(f"{path} cannot be {done}: no permission", "give a path that you may write")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path} cannot be {done}: {error.strerror}", "free space or give another path")
    return StorageError(f"{path} cannot be {done}: {error.strerror}", "give a path that can be written")


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

    Devices, pipes and names of open descriptors (/dev/stdout) are written to instead: there is nothing to replace.

    Yields:
        A file beside `path`, open for writing; it is removed when the block raises.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        StorageError: The disk refused.
    """
    refuse_existing(path, overwrite)
    temporary: str | None = None
    try:
        if is_stream(path):
            number = descriptor_of(path)
            with open(path if number is None else os.dup(number), "wb") as stream:
                yield stream
            return
        remove_leftovers(path)
        descriptor, temporary = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=PARTIAL, dir=path.parent)
        with os.fdopen(descriptor, "wb") as handle:
            hold(descriptor)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        sync_directory(path.parent)
        temporary = None
    except OSError as error:
        raise not_written(path, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` only when the block ends without an error.

    Yields:
        A directory beside `path`; it is removed when the block raises. It gets a marker where nothing in it tells that
        this program made it.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, or it is not ours to remove.
        StorageError: The disk refused.
    """
    refuse_existing_directory(path, overwrite)
    remove_leftovers(path)
    try:
        staging = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=PARTIAL, dir=path.parent))
    except OSError as error:
        raise not_written(path, error) from None
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        hold(descriptor)
        yield staging
        if not is_ours(staging):
            (staging / MARKER).write_text(f"made by reap-serve {__version__}\n")
        os.chmod(staging, 0o777 & ~_umask())
        replace_directory(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def replace_directory(staging: Path, path: Path) -> None:
    """Gives a finished directory its name; what stood there before is removed afterwards.

    Raises:
        OutputExistsError: What stands there is not ours to remove.
    """
    retired: Path | None = None
    if os.path.lexists(path):
        require_replaceable_directory(path)
        retired = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=RETIRED, dir=path.parent)) / "old"
        os.rename(path, retired)
    os.rename(staging, path)
    sync_directory(path.parent)
    if retired is not None:
        shutil.rmtree(retired.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
