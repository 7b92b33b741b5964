"""Threads that copy or read gigabytes end soon after the one that waits for them was interrupted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from reap_serve.errors import StorageError


@contextlib.contextmanager
def until_left(advance: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """An `advance` for threads that raises in each of them once the block is left, by Ctrl-C or another's failure.

    Stands inside the block of the pool, which waits for its threads.
    """
    left = threading.Event()

    def advance_until_left(num_bytes: int) -> None:
        if left.is_set():
            raise StorageError("this was stopped by another failure", "run the command again")
        advance(num_bytes)

    try:
        yield advance_until_left
    finally:
        left.set()
