"""Runs `serve_in_vllm.py` on jobs, and the oracle that vLLM is compared with."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from masked_base import masked
from serve_prompt import PROMPT

NO_MASK: Mapping[int, Sequence[int]] = {}


@dataclass(frozen=True, slots=True)
class Job:
    """One engine.

    Attributes:
        name: Of the job.
        path: The checkpoint.
        dtype: vLLM's dtype.
        attention: vLLM's attention backend, None for its choice.
        masks: Dropped experts by layer, one mapping an answer.
    """

    name: str
    path: str
    dtype: str
    attention: str | None = None
    masks: tuple[Mapping[int, Sequence[int]], ...] = (NO_MASK,)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine said.

    Attributes:
        logprobs: Of the prompt's tokens but the first.
        generated: Two tokens after the prompt.
    """

    logprobs: torch.Tensor
    generated: tuple[int, ...]


def run(jobs: Iterable[Job]) -> dict[str, tuple[Answer, ...] | str]:
    """Answers by job, one a mask, or why there is none."""
    worker = Path(__file__).with_name("serve_in_vllm.py")
    text = json.dumps([asdict(job) for job in jobs])
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.run(
        [sys.executable, str(worker), text], capture_output=True, text=True, env=environment, check=False
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"name"')]
    assert lines, process.stderr[-3000:]
    answers: dict[str, tuple[Answer, ...] | str] = {job.name: "crashed" for job in jobs}
    for line in lines:
        answers[line["name"]] = line.get("error") or tuple(
            Answer(torch.tensor(each["logprobs"]), tuple(each["generated"])) for each in line["answers"]
        )
    return answers


def masked_logprobs(base: Path, dropped: Mapping[int, Sequence[int]], num_experts: int) -> torch.Tensor:
    """Log-probabilities of the prompt's tokens but the first: the base in transformers, in float32, under a mask."""
    model = _float32_model(base)
    with torch.no_grad(), masked(model, dropped, num_experts):
        logits = model(torch.tensor([PROMPT])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


@functools.lru_cache(maxsize=1)
def _float32_model(base: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
