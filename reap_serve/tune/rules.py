"""The rules that rank experts: criteria with their mixtures and objectives, and what trials found.

Axes: L layers with routed experts, E experts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from reap_serve.plan.decision import Decision, Evidence, decide, gather, shares
from reap_serve.plan.limits import ModelLimits, ServingTarget
from reap_serve.plan.planner import make_plan
from reap_serve.plan.record import Plan
from reap_serve.plan.request import Objective, PlanRequest, Size
from reap_serve.plan.sizes import CheckpointBytes
from reap_serve.statistics.record import Statistics
from reap_serve.tune.engine import Mask

Floats = npt.NDArray[np.float64]

REAP, TRIALS = "reap", "trials"


@dataclass(frozen=True, slots=True)
class Rule:
    """What ranks the experts.

    Attributes:
        criterion: A name of `plan --criterion`, or `trials`.
        variant: What is not the default about it; empty for nothing.
        evidence: What its decisions rest on, whatever the size.
    """

    criterion: str
    variant: str
    evidence: Evidence = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Criterion and variant in one."""
        return f"{self.criterion}, {self.variant}" if self.variant else self.criterion

    @property
    def is_reap(self) -> bool:
        """Whether it is REAP as published, on tokens as observed: what every other rule has to beat."""
        return self.name == REAP


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rule at a size."""

    rule: Rule
    keep_experts: int
    decision: Decision
    mask: Mask


def criteria_rules(statistics: Statistics, model: ModelLimits, target: ServingTarget, size: Size) -> tuple[Rule, ...]:
    """The rules that statistics alone give, REAP first.

    With several slices each criterion is tried twice: tokens pooled as observed, and every slice with the same weight.

    Raises:
        PlanError: The limits contradict each other, or there is no token.
    """

    def rule(criterion: str, variant: str, mix: dict[str, float], objective: Objective) -> Rule:
        request = PlanRequest(size, criterion, mix=mix, objective=objective, target=target)
        return Rule(criterion, variant, gather(statistics, request, model))

    pooled: dict[str, float] = {}
    rules = [rule(REAP, "", pooled, "mean"), rule("asq", "", pooled, "mean")]
    slices = rules[0].evidence.slices
    if len(slices) > 1 and all(term.sums.layer_token_count_L.all() for term in rules[0].evidence.terms):
        alike = dict.fromkeys(slices, 1.0)
        rules += [
            rule(REAP, "slices alike", alike, "mean"),
            rule("asq", "slices alike", alike, "mean"),
            rule("weighted_ean_sum", "max-min", alike, "max-min"),
        ]
    return tuple(rules)


def trials_rule(prior: Rule, variant: str, score_LE: Floats) -> Rule:
    """A rule with the score that trials gave; limits and guards are those of the prior."""
    positive_LE = score_LE - score_LE.min(axis=1, keepdims=True)
    request = replace(prior.evidence.request, objective="mean")
    evidence = replace(prior.evidence, request=request, saliency_LE=score_LE, share_LE=shares(positive_LE))
    return Rule(TRIALS, variant, evidence)


def candidate(rule: Rule, keep_experts: int) -> Candidate:
    """The choice of a rule at a size.

    Raises:
        PlanError: The size breaks a limit.
    """
    decision = decide(rule.evidence, Size(keep_experts=keep_experts))
    return Candidate(rule, keep_experts, decision, mask_of(decision.kept_LE))


def mask_of(kept_LE: npt.NDArray[np.bool_]) -> Mask:
    """A choice with an id that stands for it."""
    shape = f"{kept_LE.shape}".encode()
    return Mask(hashlib.sha256(shape + np.packbits(kept_LE).tobytes()).hexdigest()[:32], kept_LE)


def plan_of(found: Candidate, statistics: Statistics, checkpoint: CheckpointBytes | None) -> Plan:
    """The plan of a candidate; its predictions are of the criterion that its rule began with."""
    asked = replace(found.rule.evidence.request, size=Size(keep_experts=found.keep_experts))
    plan = make_plan(statistics.header, replace(found.rule.evidence, request=asked), found.decision, checkpoint)
    tuned = {"rule": found.rule.name}
    return plan.model_copy(update={"criterion": found.rule.criterion, "provenance": {**plan.provenance, "tune": tuned}})
