"""A disk that takes no more files while streams go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from live_server import LiveServer, eventually, scrape
from served_material import MAX_TOKENS, Material
from streams import run_during


def serve_while_the_disk_fails(
    server: LiveServer, material: Material, break_it: Callable[[], None], mend_it: Callable[[], None]
) -> None:
    """Streams go on while no file can be written, and the next file that can be written holds what was pending."""
    server.reap("POST", "flush")
    before = server.status()

    def scenario() -> None:
        break_it()
        try:
            eventually(lambda: server.status()["writer"]["write_failures"] > before["writer"]["write_failures"])
            failing = server.reap("POST", "flush").json()["writer"]
            assert failing["files_written"] == before["writer"]["files_written"]
            assert failing["tokens_pending"] > 0
            assert failing["last_error"]
            eventually(lambda: scrape(server)["reap_serve_flush_failures_total", ()] >= failing["write_failures"])
        finally:
            mend_it()
        eventually(lambda: server.status()["writer"]["last_error"] is None)

    outcome = asyncio.run(
        run_during(server, material.prompts, material.answers, max_tokens=MAX_TOKENS, scenario=scenario)
    )
    assert outcome.failed == []
    assert outcome.wrong == []
    assert outcome.answered.total() > 0
    server.reap("POST", "flush")
    after = server.status()
    assert after["complete"] is True
    assert after["failures"] == 0
    assert after["writer"]["tokens_pending"] == 0
    assert after["writer"]["tokens_written"] > before["writer"]["tokens_written"]
