"""Calls to the workers of every engine behind one server.

Under data parallelism vLLM's `collective_rpc` runs a method in all engines and gives the answer of the first one alone.
Here every engine is asked by itself, and those that fail or do not answer in time are named.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol, cast

from reap_serve.adapter.releases.check import attribute_or_none
from reap_serve.errors import EngineError
from reap_serve.record.requests import UNCOUNTED_ARGUMENT


class Client(Protocol):
    """The part of vLLM's `EngineClient` that is used here."""

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[object, ...] = (), kwargs: None = None
    ) -> Sequence[object]:
        """Runs a method on every worker; gives the replies of the first engine's."""


async def call_workers(
    client: Client, method: str, arguments: tuple[object, ...] = (), timeout_seconds: float | None = None
) -> list[object]:
    """Runs a method on every worker of every engine.

    Args:
        client: The server's client of its engines.
        method: Of the workers.
        arguments: Its arguments.
        timeout_seconds: For the slowest engine; None waits for ever.

    Returns:
        The replies: engine after engine, of each its ranks in order.

    Raises:
        EngineError: Names the engines that failed or did not answer; the others have done what was asked.
    """
    core = attribute_or_none(client, "engine_core")
    engines: Sequence[bytes] = attribute_or_none(core, "core_engines") or ()
    if len(engines) < 2:
        return list(await client.collective_rpc(method, timeout=timeout_seconds, args=arguments))
    one_engine = cast(Any, core)._call_utility_async
    calls: list[Awaitable[Sequence[object]]] = [
        one_engine("collective_rpc", method, timeout_seconds, arguments, None, engine=engine) for engine in engines
    ]
    answers = await asyncio.gather(
        *(asyncio.wait_for(answer, timeout_seconds) for answer in calls), return_exceptions=True
    )
    missing = [
        f"engine {number}: {str(answer) or type(answer).__name__}"
        for number, answer in enumerate(answers)
        if isinstance(answer, BaseException)
    ]
    if missing:
        raise EngineError(
            f"{len(missing)} of {len(engines)} engines did not answer {method} ({'; '.join(missing)})",
            "look at the server's log, and ask again",
        )
    return [reply for answer in answers for reply in cast("Sequence[object]", answer)]


async def wake(client: Client) -> None:
    """Has every engine run a forward pass, which idle ones do not: by a request of one token that is not counted.

    What data-parallel ranks hold back is measured in their forward passes alone, and a request to one of them starts
    all. vLLM's utility for a dummy batch would leave the ranks at different steps.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False, extra_args={UNCOUNTED_ARGUMENT: True})
    request_id = f"reap-wake-{uuid.uuid4().hex}"
    async for _ in cast(Any, client).generate({"prompt_token_ids": [0]}, parameters, request_id):
        pass
