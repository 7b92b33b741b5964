"""A flush of engines that measure in forward passes alone: it waits for one, and gives idle ones one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, FakeObserver, live_engine

from reap_serve.adapter.all_engines import wake
from reap_serve.errors import EngineError
from reap_serve.record.requests import UNCOUNTED_ARGUMENT, Requests
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.step import BatchRows, NewRequest
from reap_serve.serve import link
from reap_serve.serve.last_flush import flush_before_shutdown
from reap_serve.serve.windows import LiveSetup
from reap_serve.statistics.merge import merge_files


class IdleEngine(FakeEngine):
    """Measures when a request has come."""

    def __init__(self, observer: FakeObserver, directory: Path, wakes: bool = True, shared: bool = False) -> None:
        setup = LiveSetup(
            model=MODEL, engine={}, directory=str(directory), flush_seconds=3600, minimum_tokens=1, shared=shared
        )
        super().__init__(live_engine(setup, observer))
        self.observer, self.wakes = observer, wakes
        self.requests: list[tuple[Any, Any]] = []

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> AsyncIterator[None]:
        self.requests.append((prompt, parameters))
        if self.wakes:
            self.observer.unsettled = 1
        yield None

    async def wake(self) -> None:
        await wake(self)


def flush(engine: IdleEngine, directory: Path) -> None:
    asyncio.run(link.EngineLink(engine, ObserveSettings(directory=str(directory))).control("flush"))


def test_a_running_engine_is_only_asked_again(tmp_path: Path) -> None:
    observer = FakeObserver()
    engine = IdleEngine(observer, tmp_path)
    observer.record(5)
    observer.unsettled = 3
    flush(engine, tmp_path)
    assert engine.calls == ["reap_flush"] * 3 + ["reap_status"]
    assert not engine.requests
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_an_idle_engine_gets_a_request_that_is_not_counted(tmp_path: Path) -> None:
    observer = FakeObserver()
    engine = IdleEngine(observer, tmp_path)
    observer.record(5)
    observer.unsettled = 1000
    flush(engine, tmp_path)
    ((prompt, parameters),) = engine.requests
    assert prompt == {"prompt_token_ids": [0]}
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    rows = Requests(max_slices=2)
    rows.enter(NewRequest("wake", 1, parameters.extra_args), None)
    assert rows.step(BatchRows(["wake"], [1], [0])).slot_T.tolist() == [rows.trash_slot]
    assert (rows.requests, rows.prompt_tokens_total, rows.slices) == (0, 0, [])
    assert parameters.extra_args == {UNCOUNTED_ARGUMENT: True}


def test_an_engine_that_never_measures_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "FLUSH_PAUSE_SECONDS", 0.0)
    observer = FakeObserver()
    engine = IdleEngine(observer, tmp_path, wakes=False)
    observer.unsettled = 1000
    with pytest.raises(EngineError, match="still holds tokens"):
        flush(engine, tmp_path)


@pytest.mark.parametrize("wakes", [True, False])
def test_an_orderly_end_is_told_when_all_is_written(
    wakes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "FLUSH_PAUSE_SECONDS", 0.0)
    observer = FakeObserver()
    engine = IdleEngine(observer, tmp_path, wakes=wakes, shared=True)
    observer.record(5)
    observer.unsettled = 1000

    async def end() -> None:
        ended: list[str] = []
        shutdown = flush_before_shutdown(
            lambda: ended.append("shutdown"), link.EngineLink(engine, ObserveSettings(directory=str(tmp_path)))
        )
        await asyncio.to_thread(shutdown)
        assert ended == ["shutdown"]

    asyncio.run(end())
    assert ("reap_farewell" in engine.calls) == wakes
    engine.live.close()
    assert merge_files([str(tmp_path)]).header.complete == wakes
