"""Requests of the embedded model's traffic as token sequences, in batches, and the calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.tiny_moe.conversations import DOMAINS, Conversation

BATCH_TOKENS = 6144
MIXTURE = "mixture"


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its recorded answer; positions from `prompt_tokens` on are the answer's, its end included."""

    domain: str
    token_ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right.

    Attributes:
        sequences: Positions of them in what was batched.
        tokens_BT: Token ids.
        real_BT: Which are no padding.
    """

    sequences: tuple[int, ...]
    tokens_BT: Tensor
    real_BT: Tensor


def read_sequences(artefacts: Path, split: str) -> dict[str, list[Request]]:
    """The requests of a split (`calibration` or `heldout`) by domain."""
    tokenizer = Tokenizer.from_file(str(artefacts / "model" / "tokenizer.json"))
    found: dict[str, list[Request]] = {}
    for domain in DOMAINS:
        lines = (artefacts / "traffic" / f"{domain}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines:
            each = Conversation.from_batch_line(line)
            prompt = tokenizer.encode(each.prompt(), add_special_tokens=False).ids
            ids = tokenizer.encode(each.text().removesuffix("\n"), add_special_tokens=False).ids
            found.setdefault(domain, []).append(Request(domain, tuple(ids), len(prompt)))
    return found


def batches(sequences: Sequence[Request]) -> Iterator[Batch]:
    """The sequences by length, so that little is padding."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].token_ids))
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * len(sequences[index].token_ids) > BATCH_TOKENS:
            yield _pad(sequences, group)
            group = []
        group.append(index)
    if group:
        yield _pad(sequences, group)


def _pad(sequences: Sequence[Request], group: list[int]) -> Batch:
    longest = max(len(sequences[index].token_ids) for index in group)
    tokens_BT = torch.zeros(len(group), longest, dtype=torch.int64)
    real_BT = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, index in enumerate(group):
        ids = sequences[index].token_ids
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        real_BT[row, : len(ids)] = True
    return Batch(tuple(group), tokens_BT, real_BT)


def calibration_samples(
    calibration: dict[str, list[Request]], num_samples: int, num_requests: int, seed: int
) -> dict[tuple[str, int], list[Request]]:
    """Samples by source (a domain or `mixture`) and number; those of one source share no request.

    A domain's sample and the mixture's of the same number are drawn from the same part of the traffic, and hold the
    same number of requests.
    """
    random = np.random.default_rng(seed)
    samples: dict[tuple[str, int], list[Request]] = {}
    share = -(-num_requests // len(calibration))
    for domain, sequences in calibration.items():
        order = random.permutation(len(sequences))
        if num_samples * num_requests > len(sequences):
            raise ValueError(f"{domain} has {len(sequences)} requests, {num_samples} x {num_requests} are wanted")
        for number in range(num_samples):
            part = [sequences[index] for index in order[number * num_requests : (number + 1) * num_requests]]
            samples[domain, number] = part
            samples.setdefault((MIXTURE, number), []).extend(part[:share])
    return samples
