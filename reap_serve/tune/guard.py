"""The guard: whether a plan diverges less than REAP's of its size, by more than the noise of the choosing requests.

Some rule always has the lowest divergence on a few requests. REAP stays unless that is more than chance.

Axes: C requests, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap_serve.tune.record import Difference

Floats = npt.NDArray[np.float64]

# A plan that is no better passes at most so often.
CHANCE = 0.05
# Nats per token that a plan has to gain. Divergence from the base is by how much the logarithm of the perplexity grows
# on text of the base's own: this is 0.1 % of it, and not worth a rule that fares worse on other traffic. Of 15 smaller
# gains 6 did not carry over to held-out requests (bench/paper/TUNED.md).
LEAST_GAIN = 1e-3
DRAWS = 9999
SEED = 20260101


@dataclass(frozen=True, slots=True)
class RequestSums:
    """Divergence of the requests of a slice.

    Attributes:
        divergence_C: Sum of KL(base || plan) over each request's scored tokens, nats.
        tokens_C: Scored tokens.
    """

    divergence_C: Floats
    tokens_C: Floats


def difference(plan: Mapping[str, RequestSums], reap: Mapping[str, RequestSums]) -> Difference:
    """KL of a plan less that of REAP's on the same requests, and how often chance alone makes it as low.

    With d the divergence of a request under the plan less that under REAP's, and n its tokens, the difference is the
    mean over the slices of sum d / sum n. Were both plans alike, each request might as well have had them the other way
    round: the sign of its d would be that of a coin. The p-value is the share of all such draws that give no more than
    what was found (paired randomisation test, Fisher 1935, The design of experiments, section 21); it is exact for
    any distribution of d that is symmetric then, also for few requests and heavy tails. C requests have 2^C draws, so
    that below five no plan can pass; 9,999 of them are made here, with a fixed seed, and what was found is one more.

    Args:
        plan: Sums by slice.
        reap: Sums of the same requests under REAP's plan.
    """
    shares = [
        (sums.divergence_C - reap[name].divergence_C) / (sums.tokens_C.sum() * len(plan)) for name, sums in plan.items()
    ]
    share_C = np.concatenate(shares)
    found = float(share_C.sum())
    signs_RC = 2.0 * np.random.default_rng(SEED).integers(0, 2, (DRAWS, len(share_C)), np.int8) - 1.0
    # Draws that leave every sign are ties, whatever the order in which they are summed.
    as_low = int((signs_RC @ share_C <= found + 1e-9 * np.abs(share_C).sum()).sum())
    return Difference(kl_divergence_mean=found, p_value=(1 + as_low) / (1 + DRAWS))


def is_lower(found: Difference) -> bool:
    """Whether a plan diverges less than REAP's by more than noise, and by as much as matters."""
    return found.p_value < CHANCE and found.kl_divergence_mean < -LEAST_GAIN
