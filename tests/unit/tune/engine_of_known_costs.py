"""An engine of `tune` without vLLM: each expert that a mask drops costs a known number of nats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from statistics_factory import header, window

from reap_serve.compare.answers import Answer
from reap_serve.compare.scores import TOP_LOGPROBS, TokenScores
from reap_serve.model import ModelSource, fingerprint
from reap_serve.serve.gate_watch import WatchedGates
from reap_serve.statistics.record import ExpertSums, Statistics
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.teacher_forcing import ForcedTokens
from reap_serve.tune.engine import Case, Mask

MODEL = Path(__file__).parents[3] / "reap_serve" / "demo" / "tiny_moe" / "model"
NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 32, 2
PROMPT, ANSWER = 4, 6


def requests(count: int, slices: Sequence[str] = ("a", "b"), answered: bool = True) -> tuple[Request, ...]:
    return tuple(
        Request(
            {"messages": [{"role": "user", "content": f"question {number} of {name}"}]},
            "chat",
            name,
            Origin("made", "requests", number),
            answer={"role": "assistant", "content": f"answer {number}"} if answered else None,
        )
        for name in slices
        for number in range(count)
    )


class FakeEngine:
    """Expert e of a layer costs `cost_E[e]` nats a token where its gate is 1; every token spreads its gates alike."""

    max_model_len = 100

    def __init__(self, cost_E: Sequence[float], fail_after: int | None = None) -> None:
        self.cost_E = np.asarray(cost_E)
        self.fail_after = fail_after
        self.scored: list[tuple[int, str | None]] = []
        self.observed = 0
        self.masks: dict[str, Mask] = {}
        self.masked_tokens = self.tokens = 0
        self.seconds = 0.0
        self.watched: dict[int, WatchedGates] = {}

    def cases(self, some: Sequence[Request]) -> list[Case]:
        return [
            Case(entry, ForcedTokens(list(range(10, 10 + PROMPT + ANSWER)), PROMPT, 9, entry.slice)) for entry in some
        ]

    def observe(self, cases: Sequence[Case]) -> Statistics:
        self.observed += 1
        self._spend(len(cases) * (PROMPT + ANSWER), 0)
        names = tuple(sorted({case.forced.slice for case in cases}))
        shape = (len(names), 2, NUM_LAYERS, NUM_EXPERTS)
        tokens = np.full((len(names), 2, NUM_LAYERS), 16 * len(cases), np.int64)
        count = np.full(shape, len(cases), np.int64)
        # What criteria see is the opposite of the truth for the last four experts.
        seen_E = self.cost_E.copy()
        seen_E[-4:] = seen_E[-4:][::-1]
        each = np.broadcast_to(seen_E, shape).astype(np.float64)
        sums = ExpertSums(
            count, count * 0.5, count * each, count * each**2, count * each / 2, count * each**2 / 4, each, each
        )
        return Statistics(header(fingerprint(_source()), names, window(requests=len(cases))), sums, tokens)

    def load(self, masks: Sequence[Mask]) -> None:
        self.masks = {mask.id: mask for mask in masks}

    def score(
        self, cases: Sequence[Case], masks: Sequence[str | None], *, watch: bool = False, num_top: int = TOP_LOGPROBS
    ) -> list[TokenScores]:
        found = []
        for number, (case, mask) in enumerate(zip(cases, masks, strict=True)):
            if self.fail_after is not None and len(self.scored) >= self.fail_after:
                raise KeyboardInterrupt
            self.scored.append((number, mask))
            self._spend(PROMPT + ANSWER + 1, (PROMPT + ANSWER + 1) * (mask is not None))
            found.append(self._scores(case, mask))
            if watch and mask is None:
                self.watched[number] = self._gates(case)
        return found

    def answer(self, cases: Sequence[Case], masks: Sequence[str | None], max_tokens: int) -> list[Answer]:
        self._spend(sum(PROMPT + 2 for _ in cases), sum(PROMPT + 2 for mask in masks if mask is not None))
        return [Answer([1, 2], "text", "stop") for _ in cases]

    def gates(self) -> dict[int, WatchedGates]:
        found, self.watched = self.watched, {}
        return found

    def _gates(self, case: Case) -> WatchedGates:
        rng = np.random.default_rng([case.request.line, *case.request.slice.encode()])
        rows = ANSWER + 2
        experts = np.stack([rng.choice(NUM_EXPERTS, TOP_K, replace=False) for _ in range(rows * NUM_LAYERS)]).reshape(
            rows, NUM_LAYERS, TOP_K
        )
        return WatchedGates(np.full(experts.shape, 0.5, np.float32), experts.astype(np.int32))

    def _scores(self, case: Case, mask: str | None) -> TokenScores:
        ids = np.asarray(case.scored_tokens[case.first_scored :], np.int64)
        harm_N = np.zeros(len(ids))
        if mask is not None:
            gates = self._gates(case)
            dropped_LE = ~self.masks[mask].kept_LE
            for layer in range(NUM_LAYERS):
                chosen_NK = gates.experts_TLK[: len(ids), layer]
                harm_N += (dropped_LE[layer][chosen_NK] * self.cost_E[chosen_NK] * 0.5).sum(axis=1)
        probability_N = 0.9 * np.exp(-harm_N)
        top_ids = np.full((len(ids), TOP_LOGPROBS), -1, np.int64)
        top_logprobs = np.full((len(ids), TOP_LOGPROBS), -np.inf)
        top_ids[:, 0], top_logprobs[:, 0] = ids, np.log(probability_N)
        return TokenScores(ids, np.log(probability_N), top_ids, top_logprobs)

    def _spend(self, tokens: int, masked: int) -> None:
        self.tokens += tokens
        self.masked_tokens += masked
        self.seconds += 1e-6 * tokens


def _source() -> ModelSource:
    from reap_serve.model import open_model

    return open_model(str(MODEL))


def use(monkeypatch: Any, engine: FakeEngine) -> None:
    """Makes `tune` run on it."""

    @contextlib.contextmanager
    def opened(source: ModelSource, layers: Sequence[int], arguments: Mapping[str, Any]) -> Iterator[FakeEngine]:
        yield engine

    monkeypatch.setattr("reap_serve.tune.run.open_engine", opened)
