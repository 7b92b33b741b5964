"""How a server ends: in time when it is told to, and not as if all were well when its engine died.

vLLM waits for open connections without a limit after SIGTERM, and exits with 0 after the death of its engine.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from reap_serve.shown_text import shown_logger

logger = shown_logger("reap_serve")

# From the signal to the end, besides what --shutdown-timeout grants to requests; `deploy/` grants a minute.
END_SECONDS = 40.0
# After the death of one engine, for the others to write what they recorded.
SIBLING_SECONDS = 5.0
ENGINE_DIED_CODE = 1


class Engine(Protocol):
    """The part of `adapter.server.ServedEngine` that is used here."""

    @property
    def errored(self) -> bool:
        """Whether the engine is dead."""

    def before_shutdown(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts something in front of its shutdown."""


class Ending:
    """Watches over one server's end.

    Args:
        engine: The server's engine.
        leave: Ends the process with an exit code, at once.
    """

    def __init__(self, engine: Engine, leave: Callable[[int], object] = os._exit) -> None:
        self._engine = engine
        self._leave = leave
        self._asked = False
        self._died = False

    def install(self) -> None:
        """Puts it in place: before vLLM's `shutdown` of the engine, and behind all that runs at the process's exit."""
        self._engine.before_shutdown(self.bounded)
        atexit.register(self.at_exit)

    def bounded(self, shutdown: Callable[..., Any], seconds: float = END_SECONDS) -> Callable[..., Any]:
        """`shutdown` with a bound on all that follows it."""

        def bounded_shutdown(*arguments: Any, timeout: float | None = None, **keywords: Any) -> Any:
            # vLLM calls it, too, when it leaves because the engine died.
            self._died |= not self._asked and self._engine.errored
            self._asked = True
            if self._died:
                # Its siblings live, and would be killed at once.
                timeout = max(timeout or 0.0, SIBLING_SECONDS)
            limit = seconds + (timeout or 0.0)
            overdue = threading.Timer(limit, self._overdue, (limit,))
            overdue.daemon = True
            # Called while the interpreter ends, it can start no thread, and needs none.
            with contextlib.suppress(RuntimeError):
                overdue.start()
            return shutdown(*arguments, timeout=timeout, **keywords)

        return bounded_shutdown

    def _overdue(self, limit: float) -> None:
        logger.warning("connections are still open %g s after the signal: they are cut", limit)
        _flush_streams()
        self._leave(128 + signal.SIGTERM)

    def at_exit(self) -> None:
        """The process ends: with another code than 0 where nobody asked for it and the engine is dead."""
        if self._died or (not self._asked and self._engine.errored):
            logger.error("the engine died; exit code %d", ENGINE_DIED_CODE)
            _flush_streams()
            self._leave(ENGINE_DIED_CODE)


def _flush_streams() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
