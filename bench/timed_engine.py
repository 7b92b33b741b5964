"""Engines that time their own steps, on the models and requests of `observe_overhead` and `observe_spared`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHAPES = {
    "embedded": {
        "hidden_size": 192,
        "moe_intermediate_size": 128,
        "num_experts": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "large": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
VOCABULARY = 4096
IN_FLIGHT, PROMPT_TOKENS, ANSWER_TOKENS = 16, 128, 48
PREFILL_TOKENS = 256


def build(shape: dict[str, object], directory: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, intermediate_size=384, norm_topk_prob=True, max_position_embeddings=2048, **shape
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.init_weights()
    model.save_pretrained(directory)


@dataclass(frozen=True)
class Workload:
    """What an engine is asked in a turn.

    Attributes:
        prompts: Token ids of each request.
        answer_tokens: Of each request.
        in_flight: Requests that run at a time.
        block_steps: Steps that an engine runs before the other's turn comes.
    """

    prompts: list[list[int]]
    answer_tokens: int
    in_flight: int
    block_steps: int


@dataclass
class Turn:
    """What one engine took for the requests of a turn: its own seconds, and each wait for a further token."""

    seconds: float
    cpu_seconds: float
    intervals: list[float]


class Engine:
    """An engine with a clock that runs while it works.

    Args:
        model: Directory of its model.
        compiled: Whether vLLM compiles it.
        settings: What switches observation on; None for plain vLLM.
    """

    def __init__(self, model: str, compiled: bool, settings: Mapping[str, object] | None) -> None:
        from vllm import LLM, SamplingParams

        observing: dict[str, Any] = {}
        if settings is not None:
            observing = {
                "additional_config": {"reap_serve": dict(settings)},
                "worker_extension_cls": "reap_serve.adapter.worker.ReapWorkerExtension",
            }
        llm = LLM(
            model,
            skip_tokenizer_init=True,
            enforce_eager=not compiled,
            max_model_len=1024,
            enable_prefix_caching=False,
            **observing,
        )
        self._llm = llm
        self.engine = llm.llm_engine
        self._parameters = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False)

    def begin(self, workload: Workload) -> None:
        """A turn begins."""
        self._workload = workload
        self._parameters.max_tokens = workload.answer_tokens
        self._waiting = list(enumerate(workload.prompts))
        self._active = 0
        self._seen: dict[str, tuple[int, float]] = {}
        self.turn = Turn(0.0, 0.0, [])

    @property
    def done(self) -> bool:
        """Whether all requests of the turn are answered."""
        return not self._waiting and self._active == 0

    def advance(self) -> None:
        """Runs a block of steps."""
        turn = self.turn
        started, cpu_started = time.perf_counter() - turn.seconds, time.process_time()
        for _ in range(self._workload.block_steps):
            if self.done:
                break
            while self._waiting and self._active < self._workload.in_flight:
                number, prompt = self._waiting.pop(0)
                self.engine.add_request(str(number), {"prompt_token_ids": prompt}, self._parameters)
                self._active += 1
            for output in self.engine.step():
                now, count = time.perf_counter() - started, len(output.outputs[0].token_ids)
                before, when = self._seen.get(output.request_id, (0, now))
                if before and count > before:
                    turn.intervals.append((now - when) / (count - before))
                self._seen[output.request_id] = (count, now)
                self._active -= output.finished
        turn.seconds = time.perf_counter() - started
        turn.cpu_seconds += time.process_time() - cpu_started

    def status(self) -> Any:
        """What the observed engine says of itself."""
        return self._llm.collective_rpc("reap_status")[0]

    def close(self) -> None:
        self.engine.engine_core.shutdown()


def make_workload(requests: int, *, prefill: bool, block_steps: int) -> Workload:
    """Prompts of random tokens: of a server's mix, or alone and all at once."""
    random = np.random.default_rng(0)
    prompt_tokens, answer_tokens = (PREFILL_TOKENS, 1) if prefill else (PROMPT_TOKENS, ANSWER_TOKENS)
    prompts = [random.integers(0, VOCABULARY, size=prompt_tokens).tolist() for _ in range(requests)]
    return Workload(prompts, answer_tokens, requests if prefill else IN_FLIGHT, block_steps)


def ratio_of_sums(pairs_T2: npt.NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    """Sum of the first over sum of the second column, with the 95 % interval of a ratio estimator."""
    first, second = pairs_T2.T
    ratio = float(first.sum() / second.sum())
    error = 1.96 * len(pairs_T2) ** 0.5 * float(np.std(first - ratio * second, ddof=1) / second.sum())
    return ratio, (ratio - error, ratio + error)


def rounded(values: Any) -> list[float]:
    return [round(value, 4) for value in values]


def document_of(model: str, measure: Callable[[str], str]) -> None:
    """Prints a document, and nothing of vLLM's among it.

    Args:
        model: A name of `SHAPES`, or a directory.
        measure: Gets the directory of the model, and gives the document.
    """
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as directory:
        if model in SHAPES:
            build(SHAPES[model], Path(directory))
            model = directory
        print(measure(model), file=answers)
