"""One engine of any layout behind vLLM's asynchronous client: asks it, and prints what it answered as a line of JSON.

Run as a process of its own, with the path of a JSON file as its argument:

    {"model": path, "engine": {arguments of the engine}, "steps": [step, ...]}

A step is `{"ask": [{"token_ids", "slice", "prompt_tokens", "answer_tokens", "rank", "plan"}, ...], "together": bool}`:
all at once, or one after the other on each rank; or `{"call": name, "args": [...]}`: a method of the workers of all
engines; or `{"settle": true}`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from vllm.utils import system_utils

# vLLM spawns its processes on a CPU, and each imports all of it anew, which is most of an engine's start.
system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")

import vllm.v1.worker.cpu_worker  # noqa: E402, F401 - for the processes to find
from vllm import SamplingParams  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402


async def ask_one(engine: AsyncLLM, number: int, prompt: dict[str, Any]) -> dict[str, Any]:
    """One request, answered greedily."""
    extra = {"reap_slice": prompt.get("slice", "default"), "reap_prompt_tokens": prompt.get("prompt_tokens")}
    if prompt.get("plan") is not None:
        extra["reap_plan_id"] = prompt["plan"]
    parameters = SamplingParams(
        max_tokens=prompt.get("answer_tokens", 1),
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        logprobs=prompt.get("logprobs"),
        extra_args=extra,
    )
    given = {"prompt_token_ids": prompt["token_ids"]}
    outputs = engine.generate(given, parameters, f"request-{number}", data_parallel_rank=prompt.get("rank"))
    answer = [output async for output in outputs][-1].outputs[0]
    logprobs = [{token: entry.logprob for token, entry in step.items()} for step in answer.logprobs or []]
    return {"token_ids": list(answer.token_ids), "logprobs": logprobs}


async def ask(engine: AsyncLLM, step: dict[str, Any], first_number: int) -> list[dict[str, Any]]:
    """All requests of a step, in their order."""
    prompts = list(enumerate(step["ask"], first_number))
    if step.get("together", True):
        return list(await asyncio.gather(*(ask_one(engine, number, prompt) for number, prompt in prompts)))
    ranks = sorted({prompt.get("rank") or 0 for _, prompt in prompts})

    async def in_turn(rank: int) -> list[tuple[int, dict[str, Any]]]:
        mine = [(number, prompt) for number, prompt in prompts if (prompt.get("rank") or 0) == rank]
        return [(number, await ask_one(engine, number, prompt)) for number, prompt in mine]

    answers = [pair for part in await asyncio.gather(*map(in_turn, ranks)) for pair in part]
    return [answer for _, answer in sorted(answers, key=lambda pair: pair[0])]


async def call(engine: AsyncLLM, step: dict[str, Any]) -> list[Any]:
    """The replies of all workers of all engines, engine by engine."""
    from reap_serve.adapter.all_engines import call_workers

    replies = await call_workers(engine, step["call"], tuple(step.get("args", ())), 120.0)
    return [base64.b64encode(reply).decode() if isinstance(reply, bytes) else reply for reply in replies]


async def settle(engine: AsyncLLM) -> bool:
    """Has all engines measure what they hold, as the server's link does it; whether one had to be woken for it."""
    from reap_serve.adapter.all_engines import call_workers, wake

    woken = False
    for attempt in range(50):
        if all(await call_workers(engine, "reap_settle")):
            return woken
        await asyncio.sleep(0.05)
        if attempt == 3:
            woken = True
            await wake(engine)
    raise RuntimeError("what is held was not measured")


async def main(job: dict[str, Any]) -> None:
    """Runs the steps and prints the results."""
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=job["model"], **job["engine"]))
    results: list[Any] = []
    asked = 0
    try:
        for step in job["steps"]:
            if "ask" in step:
                results.append(await ask(engine, step, asked))
                asked += len(step["ask"])
            elif "settle" in step:
                results.append(await settle(engine))
            else:
                results.append(await call(engine, step))
    finally:
        engine.shutdown()
    print("RESULTS " + json.dumps(results), flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
