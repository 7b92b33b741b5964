"""Bytes from and to a local path or any fsspec URL; a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from reap_serve import publish
from reap_serve.errors import InputFileError, OutputExistsError, RequestError, StorageError
from reap_serve.file_kinds import FileKind, is_statistics
from reap_serve.overwriting import not_of_kind

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SUFFIX = ".safetensors"
# Endings of files that are read in a directory whatever is in them, so that a broken one is no silent gap.
SUFFIXES = (SUFFIX, ".stats")
log = logging.getLogger(__name__)
# What fsspec raises where a path cannot be used: the store refuses, its driver is not installed, there is no such
# protocol, the driver does not have the operation (a web server is read but not written).
REFUSALS = (OSError, ImportError, ValueError, NotImplementedError)
READ_AHEAD_FILES = 3
READ_AHEAD_FILE_BYTES = 2**26

# An upload to these appears when it ends, so that a temporary name would only cost a copy and a right to delete.
ATOMIC_UPLOADS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"})


def is_url(path: str) -> bool:
    """Whether a path goes through fsspec: `scheme://...`; `file://` does as well."""
    return "://" in path


def expand_directories(paths: Iterable[str]) -> list[str]:
    """The paths, with each directory replaced by the statistics files in it, by name.

    These are the files with one of `SUFFIXES`, and those that begin as statistics do. A file with such a name in its
    own, as `week.stats.gz`, is passed over with a warning.

    Raises:
        InputFileError: A directory holds none, or cannot be listed.
    """
    expanded: list[str] = []
    for path in paths:
        names = _list_directory(path)
        if names is None:
            expanded.append(path)
            continue
        # Partial files of writers at work start with a dot.
        places = {name: f"{path.rstrip('/')}/{name}" for name in sorted(names) if not name.startswith(".")}
        files = [name for name, place in places.items() if name.endswith(SUFFIXES) or _begins_as_statistics(place)]
        passed = [name for name in places if name not in files and any(f"{ending}." in name for ending in SUFFIXES)]
        if not files:
            found = f"; passed over: {', '.join(passed)}" if passed else ""
            raise InputFileError(
                f"directory {path} holds no statistics file ({' or '.join(SUFFIXES)}{found})", "check the path"
            )
        if passed:
            log.warning("%s: passed over, as they are no statistics files: %s", path, ", ".join(passed))
        expanded.extend(places[name] for name in files)
    return expanded


def _begins_as_statistics(path: str) -> bool:
    try:
        if not is_url(path):
            if not os.path.isfile(path):
                return False
            with open(path, "rb") as file:
                return is_statistics(file)
        import fsspec

        system, place = fsspec.core.url_to_fs(path)
        if not system.isfile(place):
            return False
        with system.open(place, "rb") as file:
            return is_statistics(file)
    except REFUSALS:
        return False


def _list_directory(path: str) -> list[str] | None:
    try:
        if not is_url(path):
            return os.listdir(path) if os.path.isdir(path) else None
        import fsspec

        system, place = fsspec.core.url_to_fs(path)
        if not system.isdir(place):
            return None
        return [name.rstrip("/").rpartition("/")[2] for name in system.ls(place, detail=False)]
    except REFUSALS as error:
        raise InputFileError(f"{path} cannot be listed: {_reason(error)}", "check the path and its driver") from None


def require_folder(path: str) -> None:
    """Refuses a place that cannot become a folder, since it or what it lies in is none; a URL is not looked at.

    Raises:
        RequestError: Names what is there.
    """
    if is_url(path):
        return
    place = Path(path).absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    if not there.is_dir():
        raise RequestError(f"{there} is no folder, and statistics files go to one", "give another folder")


@contextlib.contextmanager
def open_source(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read, and its size in bytes; a URL is fetched whole, in one request.

    Raises:
        InputFileError: It is missing, a directory, or unreadable.
    """
    try:
        handle, size = _open(path)
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist", "check the path") from None
    except REFUSALS as error:
        raise _unreadable(path, error) from None
    with handle:
        try:
            yield handle, size
        # What else the reader raises is its own.
        except OSError as error:
            raise _unreadable(path, error) from None


def _open(path: str) -> tuple[BinaryIO, int]:
    if is_url(path):
        import fsspec

        system, place = fsspec.core.url_to_fs(path)
        content = system.cat_file(place)
        return io.BytesIO(content), len(content)
    file = cast(BinaryIO, open(path, "rb", buffering=0))  # noqa: SIM115 - the caller closes it
    return file, os.fstat(file.fileno()).st_size


def _unreadable(path: str, error: Exception) -> InputFileError:
    return InputFileError(f"{path} cannot be read: {_reason(error)}", "check the path, its permissions and its driver")


def read_ahead(paths: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
    """The paths in order, with their files' bytes: the disk works while the caller computes.

    Threads read `READ_AHEAD_FILES` files ahead into as many buffers.

    Yields:
        A path and its bytes, valid until the next is taken; None for a URL, a file above `READ_AHEAD_FILE_BYTES` and
        one that cannot be read, which are left to the caller.
    """
    with ThreadPoolExecutor(READ_AHEAD_FILES) as pool:
        started: deque[tuple[str, Future[_Buffer]]] = deque()
        free: list[_Buffer] = []
        for path in paths:
            started.append((path, pool.submit(_read_into, free.pop() if free else _Buffer(), path)))
            if len(started) > READ_AHEAD_FILES:
                path, reading = started.popleft()
                buffer = reading.result()
                yield path, buffer.content()
                free.append(buffer)
        for path, reading in started:
            yield path, reading.result().content()


@dataclass(slots=True)
class _Buffer:
    """Memory that is used again: fresh pages would cost as much as the reading."""

    memory: memoryview = field(default_factory=lambda: memoryview(bytearray()))
    size: int | None = None

    def content(self) -> memoryview | None:
        return None if self.size is None else self.memory[: self.size]


def _read_into(buffer: _Buffer, path: str) -> _Buffer:
    buffer.size = None
    if is_url(path):
        return buffer
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > READ_AHEAD_FILE_BYTES:
            return buffer
        if size > len(buffer.memory):
            buffer.memory = memoryview(bytearray(size))
        filled = 0
        while filled < size and (count := file.readinto(buffer.memory[filled:size])):
            filled += count
        buffer.size = filled
    return buffer


def refuse_existing(
    path: str, overwrite: bool, kind: FileKind | None = None, inputs: Iterable[str | Path] = ()
) -> None:
    """`publish.refuse_existing` for paths, and the same for what a URL names in its store, which is asked.

    Args:
        path: The output, a path or a URL.
        overwrite: As there.
        kind: As there.
        inputs: As there; a URL is one of them where it is written alike.

    Raises:
        OutputExistsError: As there, but for directories, which a store has not.
        StorageError: The folder of a path cannot be made or written to, or a store cannot be asked.
    """
    if not is_url(path):
        publish.refuse_existing(Path(path), overwrite, kind, inputs)
        return
    if path in map(str, inputs):
        raise OutputExistsError(f"the output {path} is read by this command", "give another path")
    if not overwrite and _at(path, lambda system, place: system.exists(place)):
        raise OutputExistsError(f"{path} exists already", "give another path or --overwrite")
    if kind is not None and _at(path, lambda system, place: _is_of_another_kind(system, place, kind)):
        raise not_of_kind(path, kind)


def _is_of_another_kind(system: AbstractFileSystem, place: str, kind: FileKind) -> bool:
    if not system.exists(place) or not system.size(place):
        return False
    with system.open(place, "rb") as file:
        return not kind.matches(file)


def _at(url: str, look: Callable[[AbstractFileSystem, str], bool]) -> bool:
    try:
        import fsspec

        system, place = fsspec.core.url_to_fs(url)
        return bool(look(system, place))
    except REFUSALS as error:
        raise StorageError(
            f"{url} cannot be written: {_reason(error)}", "check the path, its permissions and its driver"
        ) from None


def write_whole(path: str, content: bytes, *, overwrite: bool) -> None:
    """Writes a file that is there whole or not at all.

    Raises:
        OutputExistsError: It exists and `overwrite` is false.
        StorageError: The disk or the store refused.
    """
    if not is_url(path):
        publish.write_file(Path(path), content, overwrite=overwrite)
        return
    refuse_existing(path, overwrite)
    try:
        import fsspec

        system, place = fsspec.core.url_to_fs(path)
        protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        if protocols & ATOMIC_UPLOADS:
            system.pipe_file(place, content)
            return
        folder, _, name = place.rpartition("/")
        system.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.partial"
        system.pipe_file(temporary, content)
        system.mv(temporary, place)
    except REFUSALS as error:
        raise StorageError(
            f"{path} cannot be written: {_reason(error)}", "check the path, its permissions and its driver"
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
