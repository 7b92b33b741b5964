"""One engine in this process that observes, and answers and scores under many plans at once.

Every request of a batch is under a mask of its own or under none: a plan costs no start and no checkpoint. Masks are
routed as in the pruned checkpoint (see `serve.mask`).

Axes: L layers with routed experts, E experts, N tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap_serve.adapter.engine_log import stdout_to_stderr
from reap_serve.adapter.offline import (
    call_ranks,
    collect,
    longest_sequence,
    require_observable,
    run_forced,
    start_engine,
    stop_engine,
)
from reap_serve.adapter.renderer import EngineRenderer
from reap_serve.adapter.scoring import Arguments, generate_greedy, score_prompts
from reap_serve.compare.answers import Answer
from reap_serve.compare.scores import TOP_LOGPROBS, TokenScores
from reap_serve.errors import EngineError, RequestError
from reap_serve.model import ModelSource, fingerprint
from reap_serve.record.requests import PROMPT_ARGUMENT
from reap_serve.record.settings import MAX_PLANS, ObserveSettings
from reap_serve.records import JsonValue
from reap_serve.serve.gate_watch import WATCH_ARGUMENT, WatchedGates, read_gates
from reap_serve.serve.mask import PLAN_ARGUMENT
from reap_serve.statistics.merge import join_batches
from reap_serve.statistics.record import Statistics
from reap_serve.traffic.request import Request
from reap_serve.traffic.teacher_forcing import ForcedTokens, TeacherForcing

if TYPE_CHECKING:
    from reap_serve.adapter.scoring import LLM

Bools = npt.NDArray[np.bool_]

# Likeliest tokens that may be asked for; vLLM's own limit is 20.
MAX_LOGPROBS = 256
# Requests of one batch of the statistics, of which their uncertainty is reckoned.
OBSERVED_BATCH = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A request and its tokens."""

    request: Request
    forced: ForcedTokens

    @property
    def scored_tokens(self) -> list[int]:
        """The tokens that enter or end the answer: those of the prompt where there is no answer."""
        end = self.forced.end_token if self.forced.answered else None
        return [*self.forced.token_ids, *([] if end is None else [end])]

    @property
    def first_scored(self) -> int:
        """Position of the first token that is scored."""
        return self.forced.prompt_tokens if self.forced.answered else 1


@dataclass(frozen=True, slots=True)
class Mask:
    """A choice of experts, and the id by which the engine knows it."""

    id: str
    kept_LE: Bools


class TuneEngine:
    """See the module.

    Args:
        llm: vLLM's engine, with observation on.
        source: Its model.
        layer_indices: Decoder layers on axis L.

    Attributes:
        masked_tokens: Tokens computed under masks so far.
        tokens: All tokens computed so far.
        seconds: Time that they took.
    """

    def __init__(self, llm: LLM, source: ModelSource, layer_indices: Sequence[int]) -> None:
        self._llm = llm
        self._model = fingerprint(source)
        self._layers = tuple(layer_indices)
        self._forcing = TeacherForcing(EngineRenderer(llm))
        self._loaded: set[str] = set()
        self.masked_tokens = self.tokens = 0
        self.seconds = 0.0

    @property
    def max_model_len(self) -> int:
        """Longest sequence of the engine."""
        return longest_sequence(self._llm)

    def cases(self, requests: Sequence[Request]) -> list[Case]:
        """The requests that fit the engine, as tokens."""
        cases = [Case(request, self._forcing.required_tokens(request)) for request in requests]
        # One token for the end, one that scoring has to generate; without a recorded answer the first token cannot be
        # predicted from anything.
        return [case for case in cases if 2 <= len(case.forced.token_ids) <= self.max_model_len - 2]

    def observe(self, cases: Sequence[Case]) -> Statistics:
        """Runs requests through the full model and gives their statistics."""
        self._call("reap_start")
        self._call("reap_reset")
        found: Statistics | None = None
        for start in range(0, len(cases), OBSERVED_BATCH):
            batch = cases[start : start + OBSERVED_BATCH]
            with self._clock(sum(len(case.forced.token_ids) for case in batch), 0):
                run_forced(self._llm, [case.forced for case in batch])
                part = collect(self._llm, self._model)
            found = part if found is None else join_batches((found, part))
            self._call("reap_reset")
        self._call("reap_stop")
        if found is None:
            raise RequestError("no request fits the engine", "raise max_model_len by --engine-args")
        return found

    def load(self, masks: Sequence[Mask]) -> None:
        """Puts masks in the place of those loaded before.

        Raises:
            EngineError: The engine takes no masks.
        """
        assert len(masks) <= MAX_PLANS
        if {mask.id for mask in masks} <= self._loaded:
            return
        kept = {
            mask.id: {
                str(index): np.flatnonzero(row_E).tolist()
                for index, row_E in zip(self._layers, mask.kept_LE, strict=True)
            }
            for mask in masks
        }
        for problem in self._call("reap_load_masks", kept):
            if problem is not None:
                raise EngineError(
                    f"the engine takes no masks: {problem}", "see the limits in reap_serve/serve/README.md"
                )
        self._loaded = {mask.id for mask in masks}

    def score(
        self,
        cases: Sequence[Case],
        masks: Sequence[str | None],
        *,
        watch: bool = False,
        num_top: int = TOP_LOGPROBS,
    ) -> list[TokenScores]:
        """Scores each case under the mask of that id, None for the full model, in one batch.

        Args:
            cases: What is scored.
            masks: Ids of loaded masks, one a case.
            watch: Keep the gates of the cases under the full model for `gates`, by their position here.
            num_top: Likeliest tokens of each position.
        """
        prompts = [case.scored_tokens for case in cases]
        arguments = [
            _arguments(mask, {WATCH_ARGUMENT: number, PROMPT_ARGUMENT: case.first_scored} if watch else {})
            for number, (case, mask) in enumerate(zip(cases, masks, strict=True))
        ]
        lengths = [len(prompt) for prompt in prompts]
        masked = sum(length for length, mask in zip(lengths, masks, strict=True) if mask is not None)
        first = [case.first_scored for case in cases]
        with self._clock(sum(lengths), masked):
            found = score_prompts(self._llm, prompts, first, arguments, num_top)
        return [
            TokenScores(np.asarray(prompt[start:], np.int64), entry.logprob_N, entry.top_ids_NK, entry.top_logprobs_NK)
            for prompt, start, entry in zip(prompts, first, found, strict=True)
        ]

    def gates(self) -> dict[int, WatchedGates]:
        """The gates of the watched cases since the last call."""
        # Tensor-parallel ranks route alike: the first one's are everybody's.
        return read_gates(self._call("reap_take_gates")[0])

    def answer(self, cases: Sequence[Case], masks: Sequence[str | None], max_tokens: int) -> list[Answer]:
        """Greedy answers to the cases' prompts, each under its mask, in one batch."""
        prompts = [case.forced.token_ids[: case.forced.prompt_tokens] for case in cases]
        longest = [max(1, min(max_tokens, self.max_model_len - len(prompt))) for prompt in prompts]
        detections = [
            None if case.request.body is None else case.request.body.get("repetition_detection") for case in cases
        ]
        arguments = [_arguments(mask, {}) for mask in masks]
        with self._clock(0, 0):
            found = generate_greedy(self._llm, prompts, longest, arguments, detections)
        for prompt, entry, mask in zip(prompts, found, masks, strict=True):
            tokens = len(prompt) + len(entry.token_ids)
            self.tokens += tokens
            self.masked_tokens += tokens if mask is not None else 0
        return [Answer(entry.token_ids, entry.text, entry.finish_reason) for entry in found]

    def _call(self, method: str, *arguments: object) -> list:  # type: ignore[type-arg]
        return call_ranks(self._llm, method, *arguments)

    @contextlib.contextmanager
    def _clock(self, tokens: int, masked: int) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started
        self.tokens += tokens
        self.masked_tokens += masked


def _arguments(mask: str | None, more: Mapping[str, JsonValue]) -> Arguments:
    return dict(more) if mask is None else {PLAN_ARGUMENT: mask}


@contextlib.contextmanager
def open_engine(
    source: ModelSource, layer_indices: Sequence[int], arguments: Mapping[str, JsonValue]
) -> Iterator[TuneEngine]:
    """Starts the engine; it is gone when the block ends.

    Raises:
        EngineError: vLLM does not fit this release, did not start, or cannot mask this model.
    """
    require_observable(source)
    settings = ObserveSettings(recorder="inline", recording=False, drift_fraction=0.0)
    with stdout_to_stderr():
        llm = start_engine(source, settings, {"max_logprobs": MAX_LOGPROBS, **arguments})
        try:
            yield TuneEngine(llm, source, layer_indices)
        finally:
            stop_engine(llm)
