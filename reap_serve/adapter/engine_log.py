"""What an engine in this process prints, kept in a file: its log, and what kernels and libraries write themselves."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def output_to(log: IO[bytes]) -> Iterator[None]:
    """Sends what this process writes to stdout and stderr to a file, whoever writes it."""
    _flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in kept:
            os.dup2(log.fileno(), number)
        yield
    finally:
        _flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
