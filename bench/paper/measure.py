"""A changed model against the base on held-out traffic, teacher-forced.

The greedy answer of a model equals the recorded one exactly when each recorded token has the highest logit given those
before it, so that greedy exact match needs no generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.paper.network import Experts, Network
from bench.paper.traffic import Batch, Request, batches

CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one domain.

    Attributes:
        perplexity: exp of the mean loss of the answers' tokens.
        kl: Mean divergence of the changed model's next-token distribution from the base's, nats.
        agreement: Share of the answers' tokens at which both have the same most probable token.
        exact: Share of the requests whose greedy answer is the recorded one, token for token.
    """

    perplexity: float
    kl: float
    agreement: float
    exact: float


@dataclass(frozen=True, slots=True)
class _BaseRows:
    """What the divergence from the base takes: its entropy, mean output embedding and most probable token, by row."""

    entropy_N: Tensor
    embedding_NH: Tensor
    top_N: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network, hidden_NH: Tensor) -> _BaseRows:
        entropy, embedding, top = [], [], []
        for start in range(0, hidden_NH.shape[0], CHUNK_TOKENS):
            logits = network.logits(hidden_NH[start : start + CHUNK_TOKENS])
            log_p = logits.double().log_softmax(-1)
            p = log_p.exp()
            entropy.append(-(p * log_p).sum(-1))
            embedding.append(p @ network.embedding.double())
            top.append(logits.argmax(-1))
        return cls(torch.cat(entropy), torch.cat(embedding), torch.cat(top))


class HeldOut:
    """Held-out traffic with the base's hidden states.

    Args:
        network: The model.
        sequences: Requests of all domains.
    """

    def __init__(self, network: Network, sequences: Sequence[Request]) -> None:
        self._network = network
        self._sequences = sequences
        self._batches = [(batch, *_answer_rows(batch, sequences)) for batch in batches(sequences)]
        self._base = [
            _BaseRows.of(network, self._answers(batch, rows, network.layers)) for batch, rows, *_ in self._batches
        ]
        self.num_answer_tokens = sum(int(rows.shape[0]) for _, rows, _, _ in self._batches)

    @torch.no_grad()
    def measure(self, layers: Sequence[Experts]) -> dict[str, Figures]:
        """Figures by domain."""
        num = len(self._sequences)
        loss, divergence, agree, hit = (torch.zeros(num, dtype=torch.float64) for _ in range(4))
        count = torch.zeros(num, dtype=torch.float64)
        for (batch, rows, owner, target), base in zip(self._batches, self._base, strict=True):
            changed = self._answers(batch, rows, layers)
            for start in range(0, rows.shape[0], CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                logits = self._network.logits(changed[part])
                wanted, who = target[part], owner[part]
                top, normaliser = logits.argmax(-1), logits.logsumexp(-1).double()
                # sum p log p - sum p log q: the mean logit under p is the product with the mean embedding under p.
                expected = (changed[part].double() * base.embedding_NH[part]).sum(-1)
                for total, values in (
                    (loss, normaliser - logits.gather(1, wanted[:, None])[:, 0]),
                    (divergence, normaliser - expected - base.entropy_N[part]),
                    (agree, top == base.top_N[part]),
                    (hit, top == wanted),
                    (count, torch.ones_like(normaliser)),
                ):
                    total.index_add_(0, who, values.double())
        return self._by_domain(loss, divergence, agree, hit, count)

    def _by_domain(
        self, loss: Tensor, divergence: Tensor, agree: Tensor, hit: Tensor, count: Tensor
    ) -> dict[str, Figures]:
        domains = dict.fromkeys(sequence.domain for sequence in self._sequences)
        found = {}
        for domain in domains:
            mine = torch.tensor([sequence.domain == domain for sequence in self._sequences])
            tokens = count[mine].sum()
            found[domain] = Figures(
                float((loss[mine].sum() / tokens).exp()),
                float(divergence[mine].sum() / tokens),
                float(agree[mine].sum() / tokens),
                float((hit[mine] == count[mine]).double().mean()),
            )
        return found

    @torch.no_grad()
    def _answers(self, batch: Batch, rows: Tensor, layers: Sequence[Experts]) -> Tensor:
        return self._network.hidden(batch.tokens_BT, batch.real_BT, layers)[rows]


def _answer_rows(batch: Batch, sequences: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the real tokens that predict an answer's token, the sequence of each, and the token."""
    rows, owner, target, first = [], [], [], 0
    for index in batch.sequences:
        sequence = sequences[index]
        length = len(sequence.token_ids)
        for position in range(sequence.prompt_tokens - 1, length - 1):
            rows.append(first + position)
            owner.append(index)
            target.append(sequence.token_ids[position + 1])
        first += length
    return torch.tensor(rows), torch.tensor(owner), torch.tensor(target)
