"""One side of a comparison: a checkpoint that is served for it, or an endpoint that runs already."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reap_serve.compare.endpoint import ScoringEndpoint, TokenScores
from reap_serve.compare.record import LatencyReport, Memory
from reap_serve.model import open_model
from reap_serve.serve.process import serve_model
from reap_serve.traffic.endpoint import ClientSettings
from reap_serve.traffic.replay import replay
from reap_serve.traffic.request import Request
from reap_serve.traffic.schedule import Concurrency
from reap_serve.traffic.teacher_forcing import ForcedTokens

CONCURRENT_REQUESTS = 8


@dataclass(frozen=True, slots=True)
class Side:
    """A model that answers.

    Attributes:
        endpoint: Where.
        memory: What it takes.
        api_key: Bearer token of the endpoint.
    """

    endpoint: ScoringEndpoint
    memory: Memory
    api_key: str | None

    def scores(self, cases: Sequence[ForcedTokens], on_done: Callable[[], None]) -> list[TokenScores]:
        """The model's scores of the recorded answers and their end tokens; of prompts where there is no answer."""

        def score(case: ForcedTokens) -> TokenScores:
            tokens = [*case.token_ids, *([case.end_token] if case.answered and case.end_token is not None else [])]
            scores = self.endpoint.score(tokens, case.prompt_tokens if case.answered else 1)
            on_done()
            return scores

        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            return list(pool.map(score, cases))

    def answers(self, cases: Sequence[ForcedTokens], max_tokens: int) -> list[list[int]]:
        """The model's greedy answers to the prompts."""

        def answer(case: ForcedTokens) -> list[int]:
            room = (self.endpoint.max_model_len or case.prompt_tokens + max_tokens) - case.prompt_tokens
            return self.endpoint.generate(case.token_ids[: case.prompt_tokens], max(1, min(max_tokens, room)))

        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            return list(pool.map(answer, cases))

    def latency(self, requests: Sequence[Request], max_tokens: int, concurrency: int) -> LatencyReport:
        """Latency of streamed answers in a closed loop."""
        settings = ClientSettings(
            self.endpoint.url, api_key=self.api_key, model=self.endpoint.model, max_output_tokens=max_tokens
        )
        summary = asyncio.run(replay(requests, settings, Concurrency(concurrency))).summary()
        return LatencyReport(
            requests=summary.requests,
            failed=summary.failed,
            seconds=summary.seconds,
            output_tokens_per_second=summary.output_tokens / summary.seconds if summary.seconds else 0.0,
            latency=summary.latency,
        )


def is_url(reference: str) -> bool:
    """Whether a reference names a running endpoint rather than a model."""
    return reference.startswith(("http://", "https://"))


def check_reference(reference: str) -> None:
    """Refuses a model that cannot be served, before anything is started; URLs are asked later.

    Raises:
        InputFileError: It does not exist, or has no configuration.
    """
    if not is_url(reference):
        open_model(reference)


@contextlib.contextmanager
def open_side(reference: str, arguments: Sequence[str] = (), api_key: str | None = None) -> Iterator[Side]:
    """Serves a model directory or hub id by stock vLLM until the block ends, or connects to a URL.

    Args:
        reference: Directory, hub id or URL.
        arguments: Options of `vllm serve` for a model.
        api_key: Bearer token for a URL.

    Raises:
        EngineError: vLLM did not start, or the URL does not answer.
    """
    if is_url(reference):
        with ScoringEndpoint(reference, api_key) as endpoint:
            memory = Memory(weights_bytes=None, kv_cache_tokens=endpoint.kv_cache_tokens(), start_seconds=None)
            yield Side(endpoint, memory, api_key)
        return
    source = open_model(reference)
    weights_bytes = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    with serve_model(source.path, arguments) as server, ScoringEndpoint(server.url) as endpoint:
        memory = Memory(
            weights_bytes=weights_bytes,
            kv_cache_tokens=endpoint.kv_cache_tokens(),
            start_seconds=server.start_seconds,
        )
        yield Side(endpoint, memory, None)
