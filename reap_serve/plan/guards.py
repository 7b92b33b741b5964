"""Experts that the criterion does not decide: super experts stay, experts seen too little are set aside.

Axes: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap_serve.errors import PlanError
from reap_serve.plan.request import Unseen

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SUPER_EXPERT_PERCENTILE = 99.5
SUPER_EXPERT_FRACTION_OF_MAX = 0.1
SUPER_EXPERT_LAYER_FRACTION = 0.75


@dataclass(frozen=True, slots=True)
class Guards:
    """What the guards say of each expert.

    Attributes:
        super_LE: Super experts; all false when they are not asked for.
        unjudged_LE: Experts with too few tokens, super experts excepted.
        precedence_LE: 1 kept first, -1 dropped first, -2 dropped before those, 0 judged by the criterion.
    """

    super_LE: Bools
    unjudged_LE: Bools
    precedence_LE: Ints

    def guarded_by_layer(self) -> Ints:
        """Experts of each layer that are kept whatever their score, [L]."""
        guarded_L: Ints = (self.precedence_LE == 1).sum(axis=1)
        return guarded_L


def super_experts(activation_max_LE: Floats) -> Bools:
    """Super experts: few experts whose activations make the model's attention sinks (arXiv 2507.23279, section 3).

    An expert of the first three quarters of the layers is one when its largest absolute activation exceeds both the
    99.5th percentile and a tenth of the largest one, over all experts of all layers.
    """
    usual_maximum = max(
        float(np.percentile(activation_max_LE, SUPER_EXPERT_PERCENTILE)),
        SUPER_EXPERT_FRACTION_OF_MAX * float(activation_max_LE.max()),
    )
    is_super_LE: Bools = activation_max_LE > usual_maximum
    is_super_LE[int(len(is_super_LE) * SUPER_EXPERT_LAYER_FRACTION) :] = False
    return is_super_LE


def guard(
    activation_max_LE: Floats, token_count_LE: Ints, *, preserve_super_experts: bool, min_tokens: int, unseen: Unseen
) -> Guards:
    """Applies the guards that were asked for.

    Args:
        activation_max_LE: Largest absolute activation of each expert.
        token_count_LE: Tokens routed to each expert, as observed.
        preserve_super_experts: Keep super experts.
        min_tokens: Experts with fewer tokens are not judged.
        unseen: Whether those are kept or dropped first.
    """
    super_LE = (
        super_experts(activation_max_LE) if preserve_super_experts else np.zeros(token_count_LE.shape, dtype=np.bool_)
    )
    unjudged_LE = (token_count_LE < min_tokens) & ~super_LE
    precedence_LE = super_LE.astype(np.int64)
    precedence_LE[unjudged_LE] = 1 if unseen == "keep" else -1
    return Guards(super_LE, unjudged_LE, precedence_LE)


def drop_first(guards: Guards, unsound_LE: Bools) -> Guards:
    """The same guards with some experts dropped before all others, super experts among them."""
    precedence_LE = np.where(unsound_LE, -2, guards.precedence_LE)
    return Guards(guards.super_LE & ~unsound_LE, guards.unjudged_LE & ~unsound_LE, precedence_LE)


def require_room(guards: Guards, count_L: Ints, num_groups: int, layer_indices: tuple[int, ...]) -> None:
    """Refuses counts that cannot hold the guarded experts.

    Raises:
        PlanError: Names the first such layer and the numbers.
    """
    num_layers, num_experts = guards.precedence_LE.shape
    guarded_LG = (guards.precedence_LE == 1).reshape(num_layers, num_groups, num_experts // num_groups).sum(axis=2)
    room_L = count_L // num_groups
    for layer in np.flatnonzero((guarded_LG > room_L[:, np.newaxis]).any(axis=1))[:1]:
        where = f"layer {layer_indices[layer]}" + (" in one group of the router" if num_groups > 1 else "")
        raise PlanError(
            f"{where} has {guarded_LG[layer].max()} experts to keep whatever their score "
            f"({guards.super_LE[layer].sum()} super experts and {guards.unjudged_LE[layer].sum()} below --min-tokens "
            f"in the layer), but keeps {room_L[layer]}",
            "keep more experts, lower --min-tokens, give --unseen drop, or observe more traffic",
        )
