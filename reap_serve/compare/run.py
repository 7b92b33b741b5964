"""Runs a comparison: the base first, then each candidate on the very same tokens, one engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from reap_serve.compare.assemble import Candidate, report
from reap_serve.compare.latency import Replayed
from reap_serve.compare.measure import Cases, CompareSettings, measure, prepare
from reap_serve.compare.record import Report
from reap_serve.compare.side import Side, experts_of, open_side, require_endpoints
from reap_serve.errors import MismatchError, RequestError
from reap_serve.traffic.refusal import REFUSALS
from reap_serve.traffic.request import Request
from reap_serve.traffic.teacher_forcing import TeacherForcing

# Requests whose tokens must be the same in both models; they are spread over the traffic.
COMPARED_RENDERINGS = 8

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison.

    Attributes:
        report: Its figures.
        replays: The latency runs by `base` and `candidate`.
    """

    report: Report
    replays: Mapping[str, tuple[Replayed, ...]]


def compare(
    base: str,
    candidate: str,
    requests: Sequence[Request],
    settings: CompareSettings,
    on_progress: Progress = lambda side, done, total: None,
    others: Sequence[str] = (),
) -> Comparison:
    """Compares a candidate with its base.

    Args:
        base: Directory, hub id or URL.
        candidate: Likewise.
        requests: The traffic, with text.
        settings: How.
        on_progress: Called with the side's name, requests scored, and their number.
        others: Further candidates, of which the quality alone is measured.

    Raises:
        EngineError: An engine did not start or answer.
        MismatchError: The two do not share a tokenizer, or the candidate takes shorter sequences.
        RequestError: There is no request that fits.
    """
    if not requests:
        raise RequestError("there is no request in the traffic", "give traffic with text")
    require_endpoints((base, candidate, *others), settings.api_key, settings.budget)
    with open_side(base, settings.server_arguments, settings.api_key, settings.budget) as side:
        cases = prepare(side, requests, settings)
        total = len(cases.forced) * (2 if settings.noise_floor else 1)
        of_base = measure(side, cases, settings, counter("base", total, on_progress), again=settings.noise_floor)
    found = []
    for number, reference in enumerate((candidate, *others)):
        wanted = cases if number == 0 else cases.without_load()
        with open_side(reference, settings.server_arguments, settings.api_key, settings.budget) as side:
            _require_same_tokens(side, cases, base, reference)
            done = counter("candidate" if number == 0 else reference, len(cases.forced), on_progress)
            found.append(measure(side, wanted, settings if number == 0 else settings.without_load(), done))
    candidates = [
        Candidate(reference, False, experts_of(reference), measured.memory.weights_bytes, measured)
        for reference, measured in zip((candidate, *others), found, strict=True)
    ]
    return Comparison(
        report(base, candidate, cases, of_base, found[0], settings, candidates if others else ()),
        {"base": of_base.replays, "candidate": found[0].replays},
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
        try:
            rendered = forcing.tokens(cases.fitting[index]).token_ids
        except REFUSALS:
            rendered = None
        if rendered != cases.forced[index].token_ids:
            raise MismatchError(
                f"{base} and {candidate} render the same request to different tokens", "compare models of one tokenizer"
            )


def counter(side: str, total: int, on_progress: Progress) -> Callable[[], None]:
    """Tells of each request that was scored."""
    # `next` on a count is one step of the interpreter: safe from several threads.
    done = count(1)
    return lambda: on_progress(side, next(done), total)
