"""What an engine in this process says of given tokens, and its greedy answers: many requests in one batch.

Axes: N tokens, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap_serve.adapter.failures import engine_failures
from reap_serve.records import JsonValue

if TYPE_CHECKING:
    from vllm import LLM as LLM

Arguments = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of a prompt's tokens from position `first` on, natural logarithms.

    Attributes:
        logprob_N: Of the token that is there.
        top_ids_NK: The K likeliest tokens, best first.
        top_logprobs_NK: Theirs.
    """

    logprob_N: npt.NDArray[np.float64]
    top_ids_NK: npt.NDArray[np.int64]
    top_logprobs_NK: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Generated:
    """A greedy answer: its tokens, its text without special tokens, and why it ended."""

    token_ids: list[int]
    text: str
    finish_reason: str | None


def score_prompts(
    llm: LLM, prompts: Sequence[Sequence[int]], first: Sequence[int], arguments: Sequence[Arguments], num_top: int
) -> list[PromptScores]:
    """Scores prompts as vLLM's `prompt_logprobs`, all in one batch.

    Args:
        llm: The engine.
        prompts: Token ids.
        first: Position in each prompt from which on scores are wanted, 1 or more.
        arguments: `SamplingParams.extra_args` of each.
        num_top: K.

    Raises:
        EngineError: vLLM failed, or refused a prompt.
    """
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=num_top,
            flat_logprobs=True,
            extra_args=dict(entry),
        )
        for entry in arguments
    ]
    with engine_failures():
        outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False)
    found = []
    for output, start in zip(outputs, first, strict=True):
        flat = output.prompt_logprobs
        # Nothing is said of the first token; each other one has its own entry first, then the K likeliest.
        columns = num_top + 1
        skipped = (start - 1) * columns
        ids_NC = np.asarray(flat.token_ids[skipped:], np.int64).reshape(-1, columns)
        logprobs_NC = np.asarray(flat.logprobs[skipped:], np.float64).reshape(-1, columns)
        found.append(PromptScores(logprobs_NC[:, 0], ids_NC[:, 1:], logprobs_NC[:, 1:]))
    return found


def generate_greedy(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    arguments: Sequence[Arguments],
    detections: Sequence[JsonValue],
) -> list[Generated]:
    """Greedy answers, all in one batch.

    Args:
        llm: The engine.
        prompts: Token ids.
        max_tokens: Longest answer of each.
        arguments: `SamplingParams.extra_args` of each.
        detections: vLLM's `repetition_detection` of each, as a recorded request has it; None for none.

    Raises:
        EngineError: vLLM failed, or refused a prompt.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams

    parameters = [
        SamplingParams(
            max_tokens=longest,
            temperature=0.0,
            extra_args=dict(entry),
            repetition_detection=RepetitionDetectionParams(**detection) if isinstance(detection, Mapping) else None,
        )
        for longest, entry, detection in zip(max_tokens, arguments, detections, strict=True)
    ]
    with engine_failures():
        outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False)
    choices = [output.outputs[0] for output in outputs]
    return [Generated(list(choice.token_ids), choice.text, choice.finish_reason) for choice in choices]
