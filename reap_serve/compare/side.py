"""One side of a comparison: a checkpoint that is served for it, or an endpoint that runs already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from reap_serve.architectures.resolve import resolve
from reap_serve.compare.answers import Answer
from reap_serve.compare.endpoint import ScoringEndpoint
from reap_serve.compare.latency import Replayed, run_closed_loop
from reap_serve.compare.record import LoadDriver, Memory, MemoryBudget
from reap_serve.compare.resident import ResidentMemory
from reap_serve.compare.scores import TokenScores
from reap_serve.compare.validity import asks_for_tool
from reap_serve.compare.vllm_bench import run_vllm_bench
from reap_serve.errors import ArchitectureError, RequestError
from reap_serve.model import open_model, require_whole_weights
from reap_serve.records import read_json_object
from reap_serve.serve.process import KV_CACHE_OPTION, RunningServer, serve_model
from reap_serve.traffic.endpoint import ClientSettings
from reap_serve.traffic.request import Request
from reap_serve.traffic.teacher_forcing import ForcedTokens

CONCURRENT_REQUESTS = 8


@dataclass(frozen=True, slots=True)
class Side:
    """A model that answers.

    Attributes:
        endpoint: Where.
        memory: What it takes, as far as that is known at the start.
        api_key: Bearer token of the endpoint.
        resident: The watch over its processes; None for an endpoint that runs already.
    """

    endpoint: ScoringEndpoint
    memory: Memory
    api_key: str | None
    resident: ResidentMemory | None = None

    def scores(self, cases: Sequence[ForcedTokens], on_done: Callable[[], None]) -> list[TokenScores]:
        """The model's scores of the recorded answers and their end tokens; of prompts where there is no answer."""

        def score(case: ForcedTokens) -> TokenScores:
            tokens = [*case.token_ids, *([case.end_token] if case.answered and case.end_token is not None else [])]
            begin = case.prompt_tokens if case.answered else None
            scores = self.endpoint.score(tokens, begin or 1, begin)
            on_done()
            return scores

        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            return list(pool.map(score, cases))

    def answers(self, cases: Sequence[tuple[ForcedTokens, Request]], max_tokens: int) -> list[Answer]:
        """The model's greedy answers to the prompts; where a tool call is expected, as the endpoint reads it."""

        def answer(case: tuple[ForcedTokens, Request]) -> Answer:
            forced, request = case
            room = (self.endpoint.max_model_len or forced.prompt_tokens + max_tokens) - forced.prompt_tokens
            longest = max(1, min(max_tokens, room))
            detection = None if request.body is None else request.body.get("repetition_detection")
            given = self.endpoint.generate(forced.token_ids[: forced.prompt_tokens], longest, detection)
            if request.kind == "chat" and request.body is not None and asks_for_tool(request.body, request.answer):
                return replace(given, tool_calls=self.endpoint.tool_calls(request.body, longest))
            return given

        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            return list(pool.map(answer, cases))

    def latency(
        self,
        cases: Sequence[tuple[ForcedTokens, Request]],
        driver: LoadDriver,
        max_tokens: int,
        concurrency: int,
        objectives: Mapping[str, float],
    ) -> Replayed:
        """Latency of streamed answers in a closed loop."""
        settings = ClientSettings(
            self.endpoint.url, api_key=self.api_key, model=self.endpoint.model, max_output_tokens=max_tokens
        )
        if driver == "vllm-bench":
            prompts = [self.endpoint.detokenize(forced.token_ids[: forced.prompt_tokens]) for forced, _ in cases]
            return run_vllm_bench([request for _, request in cases], prompts, settings, concurrency, objectives)
        return run_closed_loop([request for _, request in cases], settings, concurrency, objectives)

    def under(self, plan: str) -> Side:
        """The same engine, asked under one of its plans."""
        return replace(self, endpoint=self.endpoint.under(plan))

    def memory_now(self) -> Memory:
        """What it takes, with the peak since it was started."""
        if self.resident is None:
            return self.memory
        return self.memory.model_copy(update={"peak_resident_bytes": self.resident.look()})


def is_url(reference: str) -> bool:
    """Whether a reference names a running endpoint rather than a model."""
    return reference.startswith(("http://", "https://"))


def check_reference(reference: str) -> None:
    """Refuses a model that cannot be served, before anything is started; URLs are asked by `require_endpoints`.

    Raises:
        InputFileError: It does not exist, has no configuration, or its weights are truncated.
    """
    if not is_url(reference):
        require_whole_weights(open_model(reference))


@contextlib.contextmanager
def open_side(
    reference: str,
    arguments: Sequence[str] = (),
    api_key: str | None = None,
    budget: MemoryBudget | None = None,
    *,
    masks: bool = False,
) -> Iterator[Side]:
    """Serves a model directory or hub id by vLLM until the block ends, or connects to a URL.

    Args:
        reference: Directory, hub id or URL.
        arguments: Options of `vllm serve` for a model.
        api_key: Bearer token for a URL.
        budget: Memory for a model; None for what the options give.
        masks: Serve so that the engine takes plans as masks; by stock vLLM otherwise.

    Raises:
        EngineError: vLLM did not start, or the URL does not answer.
        RequestError: The budget is too small, or for a URL.
    """
    if is_url(reference):
        with _endpoint(reference, api_key, budget) as endpoint:
            kv_cache = endpoint.kv_cache()
            memory = Memory(
                weights_bytes=None,
                kv_cache_tokens=kv_cache.tokens,
                kv_cache_max_concurrency=kv_cache.sequences,
                start_seconds=None,
            )
            yield Side(endpoint, memory, api_key)
        return
    source = open_model(reference)
    weights_bytes = _weights_bytes(source.path)
    cache_bytes = None if budget is None else kv_cache_bytes(budget, weights_bytes, reference)
    options = [*arguments, *([] if cache_bytes is None else [KV_CACHE_OPTION, str(cache_bytes)])]
    with (
        _serving(source.path, options, masks=masks) as server,
        ScoringEndpoint(server.url) as endpoint,
        ResidentMemory(server.pid) as resident,
    ):
        kv_cache = endpoint.kv_cache()
        memory = Memory(
            weights_bytes=weights_bytes,
            kv_cache_bytes=cache_bytes,
            kv_cache_tokens=kv_cache.tokens,
            kv_cache_max_concurrency=kv_cache.sequences,
            weights_resident_bytes=server.weights_resident_bytes,
            start_seconds=server.start_seconds,
            resident_bytes=resident.first_bytes,
        )
        yield Side(endpoint, memory, None, resident)


def require_endpoints(references: Iterable[str], api_key: str | None, budget: MemoryBudget | None) -> None:
    """Asks every URL of a comparison for its models, before the first model is served.

    Raises:
        EngineError: One does not answer.
        RequestError: The budget is for a URL, too, or one is no URL.
    """
    for reference in filter(is_url, references):
        with _endpoint(reference, api_key, budget):
            pass


def _endpoint(url: str, api_key: str | None, budget: MemoryBudget | None) -> ScoringEndpoint:
    if budget is not None:
        raise RequestError(f"{url} has its memory already", "give model directories, or no memory budget")
    return ScoringEndpoint(url, api_key)


def experts_of(reference: str) -> int | None:
    """Routed experts of a model's layers, the largest count; None for an endpoint or a family without any."""
    if is_url(reference):
        return None
    config = open_model(reference).config
    try:
        return resolve(config).limits(config).num_experts
    except ArchitectureError:
        return None


def _serving(model: Path, options: Sequence[str], *, masks: bool) -> AbstractContextManager[RunningServer]:
    if not masks:
        return serve_model(model, options)
    # It observes; comparing checkpoints must work without that stage.
    from reap_serve.serve.masked import serve_with_masks

    return serve_with_masks(model, options)


def kv_cache_bytes(budget: MemoryBudget, weights_bytes: int, reference: str) -> int:
    """What a budget leaves a model for its KV cache.

    Raises:
        RequestError: Nothing.
    """
    left = budget.size_bytes - (weights_bytes if budget.same == "memory" else 0)
    if left <= 0:
        raise RequestError(
            f"the weights of {reference} take {weights_bytes} bytes of a budget of {budget.size_bytes}",
            "raise --same-memory",
        )
    return left


def _weights_bytes(model: Path) -> int:
    """Bytes of the files that the checkpoint's index names; of all safetensors files where it has none."""
    files = set(model.glob("*.safetensors"))
    index = model / "model.safetensors.index.json"
    if index.is_file():
        named = read_json_object(index).get("weight_map")
        # Other safetensors files may lie beside it, which no engine loads.
        files &= {model / str(name) for name in named.values()} if isinstance(named, Mapping) else files
    return sum(file.stat().st_size for file in files)
