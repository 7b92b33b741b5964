"""Calls reach every engine, in order, and name those that do not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest

from reap_serve.adapter.all_engines import call_workers
from reap_serve.errors import EngineError


class Engines:
    """A client as vLLM's: `collective_rpc` tells of the first engine only."""

    def __init__(self, answers: Mapping[bytes, object]) -> None:
        self.answers = answers
        self.asked: list[bytes] = []
        self.engine_core = SimpleNamespace(core_engines=list(answers), _call_utility_async=self.ask)

    async def ask(self, utility: str, method: str, timeout: float, *rest: object, engine: bytes) -> object:
        assert utility == "collective_rpc"
        self.asked.append(engine)
        answer = self.answers[engine]
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await asyncio.sleep(60)
        return answer

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[object, ...] = (), kwargs: None = None
    ) -> Sequence[object]:
        answer = await self.ask("collective_rpc", method, timeout or 0.0, args, kwargs, engine=b"0")
        assert isinstance(answer, list)
        return answer


def test_one_engine_is_asked_as_vllm_does_it() -> None:
    assert asyncio.run(call_workers(Engines({b"0": ["a", "b"]}), "reap_status")) == ["a", "b"]


def test_the_ranks_of_all_engines_answer_in_order() -> None:
    engines = Engines({b"0": ["a", "b"], b"1": ["c", "d"]})
    assert asyncio.run(call_workers(engines, "reap_status")) == ["a", "b", "c", "d"]


def test_engines_that_fail_or_are_silent_are_named_and_the_others_are_asked() -> None:
    engines = Engines({b"0": RuntimeError("torn"), b"1": ["c"], b"2": None})
    with pytest.raises(EngineError, match=r"2 of 3 engines did not answer reap_stop \(engine 0: torn; engine 2: Time"):
        asyncio.run(call_workers(engines, "reap_stop", timeout_seconds=0.05))
    assert engines.asked == [b"0", b"1", b"2"]
