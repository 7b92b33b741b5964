"""vLLM engines in the test's own process, one after the other, with what the tests ask of them."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from reap_serve.adapter.engine_view import max_rows
from reap_serve.adapter.layer_view import moe_layers
from reap_serve.adapter.wiring import facts_of, wire_layer
from reap_serve.adapter.worker import WORKER_EXTENSION
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.recorders import RECORDERS, Parts, recorder_kind
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums
from reap_serve.record.step_recorder import StepRecorder

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
# vLLM's eager rotary operator for CPUs mis-indexes 3-D inputs.
EAGER = {"enforce_eager": True, "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
COMPILED = {"enforce_eager": False}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request.

    Attributes:
        token_ids: Its tokens.
        slice: Its slice.
        answer_tokens: How many tokens to answer.
        prompt_tokens: Where a teacher-forced answer begins; None when all of `token_ids` is the prompt.
    """

    token_ids: list[int]
    slice: str = "default"
    answer_tokens: int = 1
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens of an answer, and for each of them the log-probabilities that vLLM returned by token."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]


@contextlib.contextmanager
def engine(model: Path, settings: ObserveSettings | None, **arguments: Any) -> Iterator[Any]:
    """An engine; its memory is released at the end. None runs without observation."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    observing: dict[str, Any] = {}
    if settings is not None:
        observing = {
            "additional_config": {"reap_serve": settings.model_dump()},
            "worker_extension_cls": WORKER_EXTENSION,
        }
    chosen = {"max_model_len": 512, "enable_prefix_caching": False, "skip_tokenizer_init": True, "dtype": "float32"}
    with mock.patch.dict(os.environ, ENVIRONMENT):
        llm = None
        # An engine before this one may be garbage by now: vLLM's kernels must not be released while a graph is traced.
        gc.collect()
        try:
            llm = LLM(str(model), **{**chosen, **observing, **EAGER, **arguments})
            yield llm
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            # vLLM's n-gram drafter loads numba. The next engine's scan of all modules asks each of their values for its
            # `__dict__`, and this module's library answers with a function.
            sys.modules.pop("llvmlite.binding.ffi", None)


def ask(llm: Any, prompts: Sequence[Prompt], logprobs: int | None = None) -> list[Answer]:
    """Greedy answers to all prompts, sent at once."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            max_tokens=prompt.answer_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
            extra_args={"reap_slice": prompt.slice, "reap_prompt_tokens": prompt.prompt_tokens},
        )
        for prompt in prompts
    ]
    given = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
    return answers_of(llm.generate(given, parameters, use_tqdm=False))


def answers_of(outputs: Sequence[Any]) -> list[Answer]:
    """Answers of vLLM's outputs."""
    return [
        Answer(
            list(output.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs or []],
        )
        for output in outputs
    ]


def observer(llm: Any) -> StepRecorder:
    """The recorders of an engine with one worker."""
    return llm.collective_rpc(lambda worker: worker.model_runner.reap_live.recorder)[0]


def record_deferred(llm: Any, buffer_tokens: int) -> None:
    """Puts `deferred` recorders in the place of an engine's `inline` ones, with sums of nothing: spares an engine."""
    llm.collective_rpc("reap_reset")
    running = observer(llm)
    for number, tap in enumerate(running.taps):
        tap.recorder = DeferredRecorder(
            running._layers[number], running._window.sums[number], running._sampler, buffer_tokens
        )


def record_by_reading(llm: Any) -> None:
    """Puts recorders that read the kernel's rows in the place of an engine's others, with sums of nothing."""
    llm.collective_rpc("reap_reset")
    running = observer(llm)
    settings = running.settings.model_copy(update={"read_kernel_rows": True})
    config = llm.llm_engine.vllm_config
    for number, layer in enumerate(moe_layers(config)):
        facts, tap = facts_of(layer, settings, max_rows(config)), running.taps[number]
        assert recorder_kind(settings, facts) == "read"
        parts = Parts(
            facts, running._window.sums[number], running._sampler, None, settings.buffer_tokens, len(running.taps)
        )
        tap.recorder = RECORDERS["read"](parts)
        wire_layer(layer, tap, running.apparatus)


def snapshot(llm: Any) -> RankSums:
    """The sums of an engine with one worker."""
    return RankSums.from_bytes(llm.collective_rpc("reap_snapshot")[0])


@dataclass(slots=True)
class Spy:
    """Keeps what a layer's tap is shown, in front of the tap itself."""

    tap: Any
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor | None:
        self.calls.append((x_TH.clone(), gate_TK.clone(), ids_TK.clone()))
        return self.tap.record(x_TH, gate_TK, ids_TK)


def spy_on_layers(llm: Any) -> list[Spy]:
    """A spy in front of every layer's tap, in the order of the layers."""
    spies = []
    for layer in moe_layers(llm.llm_engine.vllm_config):
        layer.routed_experts.reap_tap = Spy(layer.routed_experts.reap_tap, [])
        spies.append(layer.routed_experts.reap_tap)
    return spies
