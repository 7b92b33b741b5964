"""Takes back what a plan dropped and the traffic misses most: the cheap answer to drift where the base is at hand."""

from __future__ import annotations

import numpy as np

from reap_serve.errors import PlanError
from reap_serve.plan.decision import Decision, Evidence, kept_mask
from reap_serve.plan.record import Plan
from reap_serve.statistics.saliency import saliency

# What the full router would give to an expert, summed over the tokens: what is missed where the expert is gone.
MISSED_BY = "gate_sum"


def restored(plan: Plan, evidence: Evidence, num_experts: int) -> Decision:
    """The decision of a plan with some dropped experts of every layer taken back.

    In each layer those with the largest sum of g over the tokens come back, g being the gate weight of the full router;
    of equal ones the lower id. The counts of the layers stay as equal as they were.

    Args:
        plan: The plan in use.
        evidence: Of statistics of the full model on today's traffic.
        num_experts: How many experts each layer gets back.

    Raises:
        PlanError: A layer has not dropped so many, or the counts that result cannot be served.
    """
    if num_experts < 1:
        raise PlanError(f"--experts is {num_experts}", "give 1 or more")
    missed_LE = saliency(evidence.sums, MISSED_BY)
    kept_LE = kept_mask(plan, missed_LE.shape[1])
    for row, layer in enumerate(plan.layers):
        if len(layer.dropped) < num_experts:
            raise PlanError(
                f"layer {layer.index} has dropped {len(layer.dropped)} experts, {num_experts} cannot come back",
                f"take back {min(len(each.dropped) for each in plan.layers)} at most",
            )
        dropped = np.array(layer.dropped)
        order = np.argsort(-missed_LE[row, dropped], kind="stable")
        kept_LE[row, dropped[order[:num_experts]]] = True
    decision = Decision(kept_LE, None)
    for count in sorted(set(decision.count_by_layer().tolist())):
        evidence.limits.require(count, f"--experts {num_experts}")
    return decision
