"""What vLLM raises while it computes, as the one error that commands print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from reap_serve.errors import EngineError, ReapServeError


@contextlib.contextmanager
def engine_failures(*passing: type[Exception]) -> Iterator[None]:
    """Turns whatever fails in a step of vLLM into an `EngineError` with the first line of what vLLM says.

    Args:
        passing: What the caller handles itself: it goes through as it is, as do errors of ours.

    Raises:
        EngineError: vLLM failed.
    """
    try:
        yield
    except Exception as error:  # whatever fails in a step of vLLM is vLLM's, and it says why
        if isinstance(error, (ReapServeError, *passing)):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise EngineError(f"vLLM failed: {lines[0]}", "see the log above, or add --debug") from error
