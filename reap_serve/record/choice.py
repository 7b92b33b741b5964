"""Which recorder a layer gets when none is asked for: what is exact, leaves the outputs alone and costs least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RecorderKind = Literal["read", "inline", "deferred", "captured", "moe_sum", "lockstep"]


@dataclass(frozen=True, slots=True)
class LayerCircumstances:
    """What the choice depends on.

    Attributes:
        rows_stay: The kernel leaves its rows in memory, where they can be read when it is over (vLLM's CPU kernel).
        rows_pass: The kernel adds a token's rows in a method of its own, in front of which they can be read (Triton and
            Marlin on a GPU).
        graphs: Steps are replayed from captured graphs.
        every_token: All tokens are recorded: no budget bounds the sampled fraction.
        outputs_served: Somebody gets the layer's outputs, so that they have to stay as they are, bit for bit.
        extra_sums: Optional sums are collected, which are made of whole rows.
    """

    rows_stay: bool
    rows_pass: bool
    graphs: bool
    every_token: bool
    outputs_served: bool
    extra_sums: bool


def choose(layer: LayerCircumstances) -> RecorderKind:
    """The recorder of a layer.

    Rows that the kernel computed anyway are read: on a CPU always, since a step that is not sampled then costs nothing;
    on a GPU where every token counts. There `moe_sum` measures all rows of a step, in a graph also those of steps that
    are not sampled, some thirty small kernels a layer; `deferred` copies the sampled rows, three small kernels a layer,
    and computes them again, so that a fraction of the tokens costs a fraction.
    """
    if layer.rows_stay and not layer.extra_sums:
        return "read"
    if layer.rows_pass and layer.every_token and not layer.extra_sums:
        return "moe_sum"
    if layer.every_token and not layer.graphs and not layer.outputs_served:
        # One expanded call in place of the plain one, where `deferred` needs both.
        return "inline"
    return "deferred"
