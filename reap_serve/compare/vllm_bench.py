"""Latency by `vllm bench serve`: it sends the prompts, and its times of each request become the report's figures.

The prompts go to it as a file in ShareGPT's form, the one of its data sets that needs no further package; it leaves out
prompts of more than 1,024 tokens and those of fewer than 4. Chats are sent as the text that the model's template makes
of them, to /v1/completions. The file holds text of the traffic and is removed when the run ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

from reap_serve.compare.latency import Replayed, latency_report
from reap_serve.engine_environment import PLUGINS_VARIABLE
from reap_serve.errors import EngineError, RequestError
from reap_serve.records import JsonValue, read_json_object
from reap_serve.traffic.endpoint import ClientSettings
from reap_serve.traffic.latency import Outcome
from reap_serve.traffic.replay import ReplayResult
from reap_serve.traffic.request import Request
from reap_serve.traffic.schedule import Concurrency


def require_vllm_bench() -> None:
    """Refuses the driver where vLLM is not installed.

    Raises:
        RequestError: It is not.
    """
    from reap_serve.adapter.releases.check import vllm_version

    if vllm_version() is None:
        raise RequestError("`vllm bench serve` needs vLLM on this machine", "install it, or give --load replay")


def run_vllm_bench(
    requests: Sequence[Request],
    prompts: Sequence[str],
    settings: ClientSettings,
    concurrency: int,
    objectives: Mapping[str, float],
) -> Replayed:
    """Sends prompts with a number of them under way.

    Args:
        requests: The requests that the prompts are of.
        prompts: Their texts, as the model is given them.
        settings: How to call the endpoint; its model has to name the tokenizer, too.
        concurrency: Requests under way at once.
        objectives: Longest seconds of a good request by name.

    Raises:
        EngineError: It stopped, or what it wrote is not of the expected form.
    """
    from reap_serve.adapter.commands import BENCH_PROGRAM
    from reap_serve.adapter.releases.check import vllm_version

    conversations = [{"conversations": [{"value": prompt}, {"value": ""}]} for prompt in prompts]
    with tempfile.TemporaryDirectory(prefix="reap-serve-bench-") as folder:
        data, result = Path(folder) / "prompts.json", Path(folder) / "result.json"
        data.write_text(json.dumps(conversations), encoding="utf-8")
        began = datetime.now(UTC)
        done = subprocess.run(
            [sys.executable, "-c", BENCH_PROGRAM, *_options(settings, len(prompts), concurrency, data, result)],
            capture_output=True,
            text=True,
            check=False,
            env={PLUGINS_VARIABLE: "", **os.environ, **_key(settings)},
        )
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            # The kind of the error alone: its text may quote a prompt.
            raise EngineError(f"`vllm bench serve` stopped with {lines[-1].split(':')[0][:80]}", "give --load replay")
        outcomes, seconds = read_outcomes(read_json_object(result))
    replayed = ReplayResult(outcomes, began, seconds)
    tool = ("vllm bench serve", vllm_version() or "unknown")
    report = latency_report(replayed, concurrency, objectives)
    return Replayed(report, replayed, requests, settings, Concurrency(concurrency), tool)


def _options(settings: ClientSettings, num_prompts: int, concurrency: int, data: Path, result: Path) -> list[str]:
    options = {
        "--backend": "openai",
        "--base-url": settings.url.rstrip("/").removesuffix("/v1"),
        "--endpoint": "/v1/completions",
        "--model": str(settings.model),
        "--dataset-name": "sharegpt",
        "--dataset-path": str(data),
        "--sharegpt-output-len": str(settings.max_output_tokens),
        "--num-prompts": str(num_prompts),
        "--max-concurrency": str(concurrency),
        "--temperature": "0",
        "--result-dir": str(result.parent),
        "--result-filename": result.name,
    }
    flags = ("--save-result", "--save-detailed", "--no-oversample", "--disable-shuffle", "--disable-tqdm")
    return [*(word for pair in options.items() for word in pair), *flags]


def _key(settings: ClientSettings) -> dict[str, str]:
    # By the environment: a command line is seen by every user of the machine.
    return {"OPENAI_API_KEY": settings.api_key} if settings.api_key else {}


def read_outcomes(document: Mapping[str, JsonValue]) -> tuple[tuple[Outcome, ...], float]:
    """One outcome a request from the lists of `--save-detailed`, and the seconds of the whole run.

    Raises:
        EngineError: The document is of another form.
    """
    try:
        columns = [document[name] for name in ("start_times", "ttfts", "itls", "input_lens", "output_lens", "errors")]
        seconds = document["duration"]
        assert isinstance(seconds, int | float)
        rows = zip(*[column for column in columns if isinstance(column, list)], strict=True)
        first = min(float(start) for start in columns[0])  # type: ignore[union-attr, arg-type]
        outcomes = [_outcome(float(start) - first, *rest) for start, *rest in rows]
    except (KeyError, TypeError, ValueError, AssertionError):
        raise EngineError(
            "`vllm bench serve` wrote a result of another form than that of vLLM 0.31 to 0.33", "give --load replay"
        ) from None
    return tuple(sorted(outcomes, key=lambda outcome: outcome.started)), float(seconds)


def _outcome(
    started: float, ttft: float, itls: Sequence[float], prompt_tokens: int, output_tokens: int, error: str
) -> Outcome:
    times = () if error else tuple(accumulate((started + ttft, *itls)))
    # The kind of the error alone: its text may quote the request.
    failure = error.strip().splitlines()[-1].split(":")[0][:80] if error else None
    return Outcome(started, started, times, prompt_tokens, 0 if error else output_tokens, failure)
