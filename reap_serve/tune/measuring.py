"""Plans measured on parts of the traffic, many in one batch; what was measured once is remembered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from reap_serve.compare.answers import Answer
from reap_serve.compare.divergence import kl_divergence
from reap_serve.compare.quality import AnswerPair, quality
from reap_serve.compare.record import Quality
from reap_serve.compare.scores import TokenScores
from reap_serve.compare.thresholds import Threshold
from reap_serve.record.settings import MAX_PLANS
from reap_serve.records import JsonValue
from reap_serve.tune.engine import Case, Mask, TuneEngine
from reap_serve.tune.guard import RequestSums
from reap_serve.tune.ledger import Ledger
from reap_serve.tune.limits import judge
from reap_serve.tune.record import Figures, Part
from reap_serve.tune.spending import Spending

_Result = TypeVar("_Result")

# Figures of greedy answers; those of the recorded ones need no generation.
_OF_ANSWERS = (
    *("same_answer", "first_divergence", "loop", "length_limit", "empty", "language", "json", "tool", "answers"),
)


@dataclass(frozen=True, slots=True)
class PartCases:
    """The cases of one part.

    Attributes:
        cases: All of them.
        answered: Positions of those whose prompts are answered freely.
    """

    cases: Sequence[Case]
    answered: Sequence[int]

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the part, greedy answers taken as long as the recorded ones."""
        scored = sum(len(case.forced.token_ids) for case in self.cases)
        return scored + sum(len(self.cases[index].forced.token_ids) for index in self.answered)


def needs_answers(limits: Sequence[Threshold]) -> bool:
    """Whether a limit is about greedy answers."""
    return any(key.startswith(_OF_ANSWERS) for limit in limits for key in limit.keys[1:])


class Measuring:
    """Quality of masks by part.

    Args:
        engine: Runs them.
        parts: The cases of each part.
        max_answer_tokens: Longest greedy answer.
        ledger: Remembers.
        spending: Knows the time.
    """

    def __init__(
        self,
        engine: TuneEngine,
        parts: Mapping[Part, PartCases],
        max_answer_tokens: int,
        ledger: Ledger,
        spending: Spending,
    ) -> None:
        self.parts = parts
        self._engine = engine
        self._max_answer_tokens = max_answer_tokens
        self._ledger = ledger
        self._spending = spending
        self._base: dict[Part, tuple[list[TokenScores], list[Answer]]] = {}

    def base(self, part: Part) -> tuple[list[TokenScores], list[Answer]]:
        """What the full model says; it stays in memory."""
        if part not in self._base:
            cases = self.parts[part].cases
            answered = [cases[index] for index in self.parts[part].answered]
            self._base[part] = (
                self._engine.score(cases, [None] * len(cases)),
                self._engine.answer(answered, [None] * len(answered), self._max_answer_tokens),
            )
        return self._base[part]

    def cost(self, masks: Sequence[Mask], part: Part) -> int:
        """Tokens of what is not yet remembered."""
        return len({mask.id for mask in masks if self._known(mask, part) is None}) * self.parts[part].tokens

    def measure(self, masks: Sequence[Mask], part: Part) -> list[dict[str, Quality]]:
        """Quality of each mask by slice."""
        unknown = {mask.id: mask for mask in masks if self._known(mask, part) is None}
        missing = list(unknown.values())
        for first in range(0, len(missing), MAX_PLANS):
            self._measure(missing[first : first + MAX_PLANS], part)
        found = []
        for mask in masks:
            known = self._known(mask, part)
            assert isinstance(known, Mapping)
            found.append({name: Quality.model_validate(value) for name, value in known.items()})
        return found

    def by_request(self, mask: Mask, part: Part) -> dict[str, RequestSums]:
        """Divergence of the requests of each slice under a mask that was measured."""
        found = self._ledger.get(f"requests:{part}:{mask.id}")
        assert isinstance(found, Mapping)
        tokens: defaultdict[str, list[int]] = defaultdict(list)
        for case in self.parts[part].cases:
            tokens[case.forced.slice].append(len(case.scored_tokens) - case.first_scored)
        return {
            name: RequestSums(np.asarray(found[name], np.float64), np.asarray(counts, np.float64))
            for name, counts in tokens.items()
        }

    def _known(self, mask: Mask, part: Part) -> object:
        return self._ledger.get(f"{part}:{mask.id}")

    def _measure(self, masks: Sequence[Mask], part: Part) -> None:
        base_scores, base_answers = self.base(part)
        cases, answered = self.parts[part].cases, self.parts[part].answered
        self._engine.load(masks)
        asked = [cases[index] for index in answered]
        scores = _in_turn(masks, cases, self._engine.score)
        answers = _in_turn(masks, asked, lambda some, ids: self._engine.answer(some, ids, self._max_answer_tokens))
        for position, mask in enumerate(masks):
            own_scores, own_answers = scores[position], answers[position]
            slices: dict[str, Quality] = {}
            sums: dict[str, JsonValue] = {}
            for name in sorted({case.forced.slice for case in cases}):
                members = [index for index, case in enumerate(cases) if case.forced.slice == name]
                pairs = [
                    AnswerPair(cases[index].request, base_answers[place], own_answers[place])
                    for place, index in enumerate(answered)
                    if cases[index].forced.slice == name
                ]
                slices[name] = quality(
                    [base_scores[index] for index in members], [own_scores[index] for index in members], pairs
                )
                sums[name] = [float(kl_divergence(base_scores[index], own_scores[index]).sum()) for index in members]
            self._ledger.put(f"requests:{part}:{mask.id}", sums, self._spending.seconds)
            value = {name: entry.model_dump(mode="json") for name, entry in slices.items()}
            self._ledger.put(f"{part}:{mask.id}", value, self._spending.seconds)
        self._ledger.put("masked_tokens", self._spending.masked_tokens, self._spending.seconds)


def _in_turn(
    masks: Sequence[Mask],
    cases: Sequence[Case],
    run: Callable[[Sequence[Case], Sequence[str | None]], list[_Result]],
) -> list[list[_Result]]:
    """Runs every case under every mask in one batch; results by mask, cases in their order."""
    if not cases:
        return [[] for _ in masks]
    pairs = [(case, mask.id) for case in cases for mask in masks]
    found = run([case for case, _ in pairs], [mask for _, mask in pairs])
    return [found[position :: len(masks)] for position in range(len(masks))]


def figures(slices: Mapping[str, Quality], limits: Sequence[Threshold]) -> Figures:
    """What is told of a candidate."""

    def by_slice(name: str) -> dict[str, float]:
        values = {key: getattr(entry, name) for key, entry in slices.items()}
        return {key: value for key, value in values.items() if value is not None}

    return Figures(
        kl_divergence_mean=float(np.mean([entry.kl_divergence_mean for entry in slices.values()])),
        perplexity_ratio=by_slice("perplexity_ratio"),
        kl_divergence=by_slice("kl_divergence_mean"),
        same_answer_fraction=by_slice("same_answer_fraction"),
        tool_calls_lost={key: int(value) for key, value in by_slice("tool_calls_lost").items()},
        limits=judge(limits, slices),
    )


def choose_answered(cases: Sequence[Case], per_slice: int) -> list[int]:
    """The first cases of each slice."""
    seen: defaultdict[str, int] = defaultdict(int)
    chosen = []
    for index, case in enumerate(cases):
        if seen[case.forced.slice] < per_slice:
            chosen.append(index)
        seen[case.forced.slice] += 1
    return chosen
