"""How sure a choice is: which decisions would change on as much traffic again, and when that is too many.

Axes: L layers, E experts, G groups of the router.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reap_serve.errors import PlanError
from reap_serve.plan.decision import Decision, Evidence
from reap_serve.statistics.uncertainty import expected_instability, standard_error, tokens_for_instability

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Where all experts are equal in truth, estimate and repetition have correlation 1 / sqrt(3), and of half of the experts
# arccos(1 / sqrt(3)) / pi = 0.304 change sides: 0.61 of the 2 f (1 - f) of two independent draws of a fraction f.
NOISE_FRACTION = 0.6


def instability(evidence: Evidence, decision: Decision) -> Floats | None:
    """Expected fraction of each layer's decisions that as much traffic again would change, axis [L].

    Of the choice by the mixture's saliency at the decision's counts, guarded experts never changing; one by max-min is
    not modelled, and takes that of the mixture as its estimate.

    Returns:
        None for criteria of which no standard error is known, and where a layer drops experts of which none was judged.
    """
    saliency_LE, error_LE = _with_guards(evidence)
    if not np.isfinite(error_LE).any() or evidence.request.criterion == "random":
        return None
    if unjudged_layers(evidence, decision):
        return None
    num_layers, num_experts = saliency_LE.shape
    num_groups = evidence.model.num_groups
    of_group = expected_instability(
        saliency_LE.reshape(-1, num_experts // num_groups),
        error_LE.reshape(-1, num_experts // num_groups),
        np.repeat(decision.count_by_layer() // num_groups, num_groups).tolist(),
    )
    by_layer: Floats = of_group.reshape(num_layers, num_groups).mean(axis=1)
    return by_layer


def unjudged_layers(evidence: Evidence, decision: Decision) -> tuple[int, ...]:
    """Positions on axis L of layers that drop experts and of which no expert was judged, for too few tokens."""
    guards = evidence.guards
    drops_L = ~decision.kept_LE.all(axis=1)
    is_unjudged_L = guards.unjudged_LE.any(axis=1) & ~(guards.precedence_LE == 0).any(axis=1)
    return tuple(np.flatnonzero(drops_L & is_unjudged_L).tolist())


def refuse_unjudged(evidence: Evidence, decision: Decision) -> None:
    """Refuses a choice in layers of which no expert was judged: which of them stay would be a matter of their numbers.

    Raises:
        PlanError: With the layers, `min_tokens`, and the most tokens that an expert of them had.
    """
    rows = list(unjudged_layers(evidence, decision))
    if not rows or evidence.request.force:
        return
    most = int(np.sum([term.sums.token_count_LE for term in evidence.terms], axis=0)[rows].max())
    raise PlanError(
        f"in {len(rows)} of {len(decision.kept_LE)} layers every expert has fewer than --min-tokens "
        f"{evidence.request.min_tokens} tokens (layer {evidence.layer_indices[rows[0]]} is the first, {most} tokens "
        "the most of an expert in them), so that nothing says which to drop",
        f"give --min-tokens {most} or less, observe more traffic, or give --force",
    )


def refuse_instability(evidence: Evidence, decision: Decision) -> None:
    """Refuses a choice that the statistics do not support.

    The limit is `max_instability`, or the share of decisions that would change if all experts were equal and their
    saliencies nothing but noise.

    Raises:
        PlanError: With the expected fraction, the limit, and the tokens that would bring it under the limit.
    """
    request = evidence.request
    instability_L = instability(evidence, decision)
    if instability_L is None or request.force:
        return
    kept_fraction = float(decision.kept_LE.mean())
    limit = request.max_instability
    by_noise = NOISE_FRACTION * 2 * kept_fraction * (1 - kept_fraction)
    if limit is None:
        limit = by_noise
    expected = float(instability_L.mean())
    if expected <= limit:
        return
    num_tokens = int(evidence.sums.layer_token_count_L.max())
    saliency_LE, error_LE = _with_guards(evidence)
    needed = tokens_for_instability(
        saliency_LE, error_LE, decision.count_by_layer().tolist(), num_tokens, max(limit, 1e-6)
    )
    more = "observe more traffic" if needed is None else f"observe about {needed} tokens ({num_tokens} so far)"
    raise PlanError(
        f"the choice is too unstable: on as much traffic again {expected:.1%} of the decisions are expected to change, "
        f"the limit is {limit:.1%} (noise alone would change {by_noise:.1%})",
        f"{more}, or give --force",
    )


def _with_guards(evidence: Evidence) -> tuple[Floats, Floats]:
    """Saliency and standard error, with guarded experts beyond all others and certain."""
    precedence_LE = evidence.guards.precedence_LE
    saliency_LE = np.where(precedence_LE == 0, evidence.saliency_LE, np.copysign(np.inf, precedence_LE))
    error_LE = np.where(precedence_LE == 0, standard_error(evidence.terms, evidence.request.criterion), 0.0)
    return saliency_LE, error_LE
