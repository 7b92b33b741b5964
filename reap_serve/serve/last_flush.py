"""The last statistics file of a server that is told to stop.

vLLM's server kills its engine processes at once unless it is started with --shutdown-timeout, so what was recorded
since the last file has to be written before the engine hears of it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from reap_serve.serve.link import EngineLink
from reap_serve.shown_text import shown_logger

logger = shown_logger("reap_serve")

LAST_FLUSH_SECONDS = 15.0


def flush_before_shutdown(shutdown: Callable[..., Any], link: EngineLink) -> Callable[..., Any]:
    """vLLM's `shutdown` of the engine with a flush before it, for at most fifteen seconds.

    Called in the server's event loop; vLLM calls the result from a thread, while the loop goes on.
    """
    loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()

    def shutdown_after_flush(*arguments: Any, **keywords: Any) -> Any:
        if loop.is_running() and threading.get_ident() != loop_thread:
            flush = asyncio.run_coroutine_threadsafe(link.end(), loop)
            try:
                flush.result(LAST_FLUSH_SECONDS)
            except Exception as error:  # noqa: BLE001 - stopping must not fail
                flush.cancel()
                logger.warning("the last statistics were not written: %s: %s", type(error).__name__, error)
        return shutdown(*arguments, **keywords)

    return shutdown_after_flush
