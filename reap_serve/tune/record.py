"""The report of `tune`: report.json, and the JSON document of the command."""

from __future__ import annotations

from typing import Literal

from reap_serve.compare.record import Quality
from reap_serve.records import FileRecord, Provenance, Record

SCHEMA_VERSION = 1

Part = Literal["selection", "held-out"]


class LimitResult(Record):
    """A limit, judged for one plan.

    Attributes:
        limit: As the user wrote it.
        value: The end of the figure's 95 % interval that hurts, of the slice where it hurts most; the figure itself
            where it has no interval. None where no slice has the figure.
        held: Whether that value meets the limit.
        slice: Name of that slice.
    """

    limit: str
    value: float | None
    held: bool
    slice: str | None = None


class Figures(Record):
    """What one plan did on one part of the traffic.

    Attributes:
        kl_divergence_mean: Mean over the slices of KL(base || plan) per token, nats.
        perplexity_ratio: By slice.
        kl_divergence: Mean by slice.
        same_answer_fraction: By slice, where answers were generated.
        tool_calls_lost: By slice, where tool calls were expected.
        limits: Every limit, judged here.
    """

    kl_divergence_mean: float
    perplexity_ratio: dict[str, float]
    kl_divergence: dict[str, float]
    same_answer_fraction: dict[str, float]
    tool_calls_lost: dict[str, int]
    limits: tuple[LimitResult, ...]


class Difference(Record):
    """Divergence of a plan less that of REAP's plan of the same size, on the same requests.

    Attributes:
        kl_divergence_mean: Mean over the slices, nats per token; below 0 where the plan diverges less.
        p_value: How often chance alone makes it as low, see `guard.difference`.
    """

    kl_divergence_mean: float
    p_value: float


class CandidateResult(Record):
    """One plan that was tried.

    Attributes:
        criterion: What ranked its experts: a name of `plan --criterion`, or `trials`.
        variant: Mixture or objective where they are not the default, or the round of the trials.
        keep_experts: Experts per layer.
        part: On which requests it was measured.
        held: Whether it meets every limit there.
        figures: What it did.
        over_reap: On the selection requests; None of REAP itself, and where REAP was not tried at that size.
        chosen: Whether it is the result.
    """

    criterion: str
    variant: str
    keep_experts: int
    part: Part
    held: bool
    figures: Figures
    over_reap: Difference | None
    chosen: bool


class SplitSummary(Record):
    """How the traffic was parted: whole conversations, by slice, by a hash with the seed.

    Attributes:
        seed: Of the split.
        requests: By part: `statistics` (observed and tried), `selection` (chooses), `held-out` (judges).
        conversations: Likewise.
        left_out: Requests that do not fit the engine or have no recorded answer.
    """

    seed: int
    requests: dict[str, int]
    conversations: dict[str, int]
    left_out: int


class TrialRound(Record):
    """One round of trials.

    Attributes:
        keep_experts: Experts per layer that a mask keeps.
        spread: Largest distance from the edge, in ranks, at which an expert may change sides.
        masks: Masks that were drawn.
        masked_tokens: Tokens computed under them.
        seconds: Time of the round.
        penalty: Ridge penalty that cross-validation over requests chose; None in the form of sums per expert.
        explained: Share of the variation between the masks of a request that the regression predicts on requests that
            it did not see.
    """

    keep_experts: int
    spread: float
    masks: int
    masked_tokens: int
    seconds: float
    penalty: float | None
    explained: float | None


class TuneReport(FileRecord):
    """What `tune` found.

    Attributes:
        model: As the user named it.
        plan: Path of the plan; None when nothing can go.
        keep_experts: Experts per layer of the plan; all of them without one.
        num_experts: Experts per layer of the model.
        criterion: What ranked the plan's experts; None without one.
        variant: As in `CandidateResult`.
        held: Whether every limit holds on the held-out requests.
        reason: Why this plan.
        limits: Judged on the held-out requests: of the plan, or of the largest one that was tried where none holds.
        candidates: Every plan that was tried, in that order.
        held_out: Quality of the plan on the held-out requests by slice: figures that chose nothing.
        next_smaller: The next smaller plan on the held-out requests, None where it was not tried.
        held_out_looks: Sizes that were judged on the held-out requests.
        split: Of the traffic.
        trials: Rounds of trials.
        budget: What might be spent.
        budget_exhausted: Whether it ended the search early.
        masked_tokens: Tokens computed under masks.
        tokens: All tokens computed.
        seconds: Time of the whole run, without that of an earlier, interrupted one.
        notes: What to know.
    """

    provenance: Provenance
    model: str
    plan: str | None
    keep_experts: int
    num_experts: int
    criterion: str | None
    variant: str
    held: bool
    reason: str
    limits: tuple[LimitResult, ...]
    candidates: tuple[CandidateResult, ...]
    held_out: dict[str, Quality]
    next_smaller: CandidateResult | None
    held_out_looks: int
    split: SplitSummary
    trials: tuple[TrialRound, ...]
    budget: str
    budget_exhausted: bool
    masked_tokens: int
    tokens: int
    seconds: float
    notes: tuple[str, ...]
