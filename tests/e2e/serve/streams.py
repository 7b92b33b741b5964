"""Many streamed chat requests at once through the openai client, each with what stock vLLM answers to it."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx
import openai
from live_server import KEY, LiveServer

STREAMS = 32


@dataclass
class Outcome:
    """What became of the requests.

    Attributes:
        answered: By the plan that was asked for; `default` asked for none.
        wrong: Answers of another plan.
        failed: Errors.
    """

    answered: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


async def ask(client: openai.AsyncOpenAI, prompt: str, plan: str | None, max_tokens: int) -> str:
    """One streamed greedy answer."""
    arguments = {} if plan is None else {"vllm_xargs": {"reap_plan": plan}}
    stream = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
        extra_body=arguments,
    )
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    return "".join(parts)


class Load:
    """Requests for the base, for each plan and for the default, and what became of them.

    A request for the default is right if it has the answer of any plan that can be the default.

    Args:
        prompts: User messages.
        answers: What each plan answers to each.
        max_tokens: Longest answer.
    """

    def __init__(self, prompts: Sequence[str], answers: Mapping[str, Sequence[str]], max_tokens: int) -> None:
        self.outcome = Outcome()
        self._prompts = prompts
        self._answers = answers
        self._max_tokens = max_tokens
        self._order = random.Random(0)

    async def stream(self, client: openai.AsyncOpenAI, more: Callable[[], bool]) -> None:
        """Sends one request after the other while there are more."""
        plans: list[str | None] = [*self._answers, None]
        while more():
            number, plan = self._order.randrange(len(self._prompts)), self._order.choice(plans)
            name = plan or "default"
            try:
                answer = await ask(client, self._prompts[number], plan, self._max_tokens)
            except openai.OpenAIError as error:
                self.outcome.failed.append(f"{name}: {error} ({error.__cause__!r})")
                continue
            known = self._answers.values() if plan is None else [self._answers[plan]]
            if answer in {answers[number] for answers in known}:
                self.outcome.answered[name] += 1
            else:
                self.outcome.wrong.append((name, self._prompts[number], answer))


def client_of(server: LiveServer) -> openai.AsyncOpenAI:
    """A client that shows every failure.

    vLLM closes connections that were idle for five seconds, which is as long as httpx takes them for usable: a request
    that is sent in that moment gets a `ReadError`, observed or not. This client gives them up earlier.
    """
    limits = httpx.Limits(max_keepalive_connections=STREAMS, keepalive_expiry=1.0)
    http_client = openai.DefaultAsyncHttpxClient(limits=limits, timeout=300)
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, http_client=http_client)


async def run_streams(
    server: LiveServer,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    *,
    requests: int,
    max_tokens: int,
    disturb: Callable[[], Awaitable[None]],
) -> Outcome:
    """Sends so many requests while `disturb` runs again and again."""
    load, left = Load(prompts, answers, max_tokens), iter(range(requests))

    async def keep_disturbing() -> None:
        while True:
            await disturb()

    async with client_of(server) as client:
        disturbing = asyncio.create_task(keep_disturbing())
        await asyncio.gather(*(load.stream(client, lambda: next(left, None) is not None) for _ in range(STREAMS)))
        disturbing.cancel()
        await asyncio.gather(disturbing, return_exceptions=True)
        if not disturbing.cancelled() and (error := disturbing.exception()) is not None:
            raise error
    return load.outcome


async def run_during(
    server: LiveServer,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    *,
    max_tokens: int,
    scenario: Callable[[], None],
) -> Outcome:
    """Sends requests for as long as `scenario` takes, in a thread of its own."""
    load = Load(prompts, answers, max_tokens)
    async with client_of(server) as client:
        running = asyncio.create_task(asyncio.to_thread(scenario))
        await asyncio.gather(*(load.stream(client, lambda: not running.done()) for _ in range(STREAMS)))
        await running
    return load.outcome


async def run_under_control(
    server: LiveServer,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    *,
    requests: int,
    max_tokens: int,
) -> Outcome:
    """Sends so many requests while recording and the default are switched; in the end it records the full model.

    Raises:
        AssertionError: A call of a route failed, or they were too few.
    """
    calls = itertools.cycle(
        [
            *(("POST", "stop", None), ("PUT", "mask", {"name": "a"}), ("POST", "flush", None)),
            *(("POST", "start", None), ("PUT", "mask", {"name": "b"}), ("GET", "stats", None)),
            ("DELETE", "mask", None),
        ]
    )
    done = 0

    async def control() -> None:
        nonlocal done
        response = await asyncio.to_thread(server.reap, *next(calls))
        assert response.status_code == 200, response.text
        done += 1
        await asyncio.sleep(0.2)

    outcome = await run_streams(server, prompts, answers, requests=requests, max_tokens=max_tokens, disturb=control)
    assert done > 7
    assert server.reap("DELETE", "mask").status_code == 200
    assert server.reap("POST", "start").json()["recording"] is True
    return outcome
