"""The directory beside OUTPUT in which it grows: found again after a crash, given its name when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from reap_serve.errors import ExecutionError, StorageError
from reap_serve.publish import replace_directory, sync_directory, write_file

JOB_NAME = "job"
LOCK_NAME = "lock"
CONTENT_NAME = "content"
DIGESTS_NAME = "digests"
MAX_NAME_BYTES = 255


@contextlib.contextmanager
def staging_directory(output: Path, digest: str) -> Iterator[Path]:
    """A directory to fill, kept for the next attempt when the block raises.

    What an earlier attempt at the same job left there is still in it; another job's is removed first. On success it
    takes the name `output`, and what stood there before is removed.

    Args:
        output: The final name.
        digest: Identifies the job.

    Raises:
        ExecutionError: Another process works at the same output.
        StorageError: The disk refused.
    """
    home = _home(output)
    content = home / CONTENT_NAME
    try:
        home.mkdir(exist_ok=True)
        lock = FileLock(home / LOCK_NAME)
        lock.acquire(blocking=False)
    except Timeout:
        raise ExecutionError(f"another process is writing {output}", "wait for it or give another path") from None
    except OSError as error:
        raise StorageError(f"{home} cannot be made: {error.strerror}", "give a path that can be written") from None
    try:
        _prepare(home, content, digest)
        yield content
        sync_directory(content)
        replace_directory(content, output)
        shutil.rmtree(home, ignore_errors=True)
    finally:
        lock.release()


def _prepare(home: Path, content: Path, digest: str) -> None:
    job = home / JOB_NAME
    if job.exists() and job.read_text(errors="replace") != digest:
        # Content first: a crash between the two must not leave old content under a new digest.
        shutil.rmtree(content, ignore_errors=True)
        job.unlink()
    if not job.exists():
        shutil.rmtree(content, ignore_errors=True)
        write_file(job, digest.encode(), overwrite=True)
    content.mkdir(exist_ok=True)


def staged_content(output: Path, digest: str) -> Path | None:
    """What an earlier attempt at the same job left, None when there is nothing."""
    home = _home(output)
    job = home / JOB_NAME
    return home / CONTENT_NAME if job.exists() and job.read_text(errors="replace") == digest else None


def _home(output: Path) -> Path:
    name = f".{output.name}.reap-prune"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        # A long name leaves no room for what is added to it.
        name = f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()}.reap-prune"
    return output.parent / name
