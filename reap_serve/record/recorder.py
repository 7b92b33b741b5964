"""What a recorder is, and what it may know of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

ForwardExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a recorder needs of a fused MoE layer.

    Attributes:
        name: vLLM's name of the layer.
        index: Index of the decoder layer.
        num_experts: Experts of the layer, over all ranks.
        top_k: Experts per token.
        gate_scale: Factor that the layer applies to the routed output after the weighted sum
            (`routed_scaling_factor` where the runner applies it): part of the gate weight.
        weight_on_input: The weight multiplies the expert's input (Llama 4), so the output row is what the model adds.
        forward_experts: The layer's own kernel: (x [N, H], weights [N, k], ids [N, k]) to [N, H].
        complete_rows: Adds up the partial rows of tensor-parallel ranks, None where rows are complete; may work in
            place.
        expert_map_E: Local index of each expert, -1 for those of other ranks; None where all are here.
    """

    name: str
    index: int
    num_experts: int
    top_k: int
    gate_scale: float
    weight_on_input: bool
    forward_experts: ForwardExperts
    complete_rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    expert_map_E: torch.Tensor | None = None


class Recorder(Protocol):
    """Turns the routed tokens of one layer into sums."""

    def observe(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor | None:
        """Sees one call of the layer.

        Args:
            x_TH: Input of the experts.
            gate_TK: Weights that the router returned, float32.
            expert_ids_TK: Chosen experts, logical ids.

        Returns:
            The layer's output when the recorder computed it, None when the layer has to.
        """

    def flush(self) -> None:
        """Measures what is still held back."""
