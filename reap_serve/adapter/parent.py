"""Ends a process of vLLM when its parent is dead.

An engine whose API server was killed would keep its memory and its device: nothing in vLLM tells it. The end of the
parent is read from the pipe by which Python's multiprocessing started the process, so it is noticed at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection

# Set by `reap-serve serve`; vLLM's processes inherit it.
VARIABLE = "REAP_SERVE_END_WITH_PARENT"
# For the last statistics file; then the process ends without asking.
END_SECONDS = 20.0


def end_with_parent() -> None:
    """Watches the parent of this process from now on, where `reap-serve serve` started it and it has one."""
    parent = multiprocessing.parent_process()
    if os.environ.get(VARIABLE) != "1" or parent is None:
        return
    if not any(thread.name == VARIABLE for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(parent.sentinel,), name=VARIABLE, daemon=True).start()


def _watch(sentinel: int) -> None:
    connection.wait([sentinel])
    # As the parent would have ended it: the engine leaves its loop and closes its files.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)
