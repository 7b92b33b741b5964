"""Many streamed chat requests at once through the openai client, each with what stock vLLM answers to it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

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


async def run_streams(
    server: LiveServer,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    *,
    requests: int,
    max_tokens: int,
    disturb: Callable[[], Awaitable[None]],
) -> Outcome:
    """Sends requests for the base, for each plan and for the default, while `disturb` runs again and again.

    A request for the default is right if it has the answer of any plan that can be the default.
    """
    outcome, order = Outcome(), random.Random(0)
    plans: list[str | None] = [*answers, None]
    jobs = [(order.randrange(len(prompts)), order.choice(plans)) for _ in range(requests)]
    pending = iter(jobs)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300) as client:

        async def stream() -> None:
            for number, plan in pending:
                name = plan or "default"
                try:
                    answer = await ask(client, prompts[number], plan, max_tokens)
                except openai.OpenAIError as error:
                    outcome.failed.append(f"{name}: {error}")
                    continue
                right = {answers[plan][number]} if plan is not None else {each[number] for each in answers.values()}
                if answer in right:
                    outcome.answered[name] += 1
                else:
                    outcome.wrong.append((name, prompts[number], answer))

        async def keep_disturbing() -> None:
            while True:
                await disturb()

        disturbing = asyncio.create_task(keep_disturbing())
        await asyncio.gather(*(stream() for _ in range(STREAMS)))
        disturbing.cancel()
        await asyncio.gather(disturbing, return_exceptions=True)
        if disturbing.done() and not disturbing.cancelled() and disturbing.exception() is not None:
            raise disturbing.exception()  # type: ignore[misc]
    return outcome
