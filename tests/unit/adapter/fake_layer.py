"""A fused MoE layer whose outputs can be worked out in the head: expert e multiplies its input by e + 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from reap_serve.record.accumulate import MAX_COLUMNS, SUM_COLUMNS, LayerSums
from reap_serve.record.recorder import LayerFacts

# The sums that tests work out by hand: count, g, |f|, |f|^2, g|f|, (g|f|)^2; and the maxima.
WORKED_OUT = ("token_count", "gate_sum", "norm_sum", "norm_sq_sum", "weighted_norm_sum", "weighted_norm_sq_sum")
MAXIMA = ("norm_max", "activation_max")


def cells(sums: LayerSums) -> torch.Tensor:
    """A layer's sums [S, E, C] in the order of `WORKED_OUT`, whatever else is declared."""
    return sums.sums_SEC[..., [SUM_COLUMNS.index(name) for name in WORKED_OUT]]


def largest(sums: LayerSums) -> torch.Tensor:
    """A layer's maxima [S, E, C] in the order of `MAXIMA`, likewise."""
    return sums.maxima_SEC[..., [MAX_COLUMNS.index(name) for name in MAXIMA]]


@dataclass(slots=True)
class FakeExperts:
    """The kernel: sum over k of weight * (id + 1) * x, the same whether the weight is on the input or the output.

    Attributes:
        num_experts: Experts.
        overwrites_weights: Leaves ones in the weights, as vLLM's CPU kernel does when they are on the input.
        calls: Rows and columns of the ids of each call.
    """

    num_experts: int = 4
    overwrites_weights: bool = False
    calls: list[tuple[int, int]] = field(default_factory=list)

    def forward(self, x_NH: torch.Tensor, weight_NK: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        self.calls.append((ids_NK.shape[0], ids_NK.shape[1]))
        factor_NK = weight_NK * (ids_NK + 1)
        if self.overwrites_weights:
            weight_NK.fill_(1.0)
        return (x_NH.float() * factor_NK.sum(dim=1, keepdim=True)).to(x_NH.dtype)


def facts(
    experts: FakeExperts,
    top_k: int = 2,
    gate_scale: float = 1.0,
    weight_on_input: bool = False,
    complete_rows: Callable[[torch.Tensor], torch.Tensor] | None = None,
    expert_map_E: torch.Tensor | None = None,
) -> LayerFacts:
    """What a recorder knows of the fake layer."""
    return LayerFacts(
        name="model.layers.0.mlp.experts",
        index=0,
        num_experts=experts.num_experts,
        top_k=top_k,
        gate_scale=gate_scale,
        weight_on_input=weight_on_input,
        forward_experts=experts.forward,
        complete_rows=complete_rows,
        expert_map_E=expert_map_E,
    )
