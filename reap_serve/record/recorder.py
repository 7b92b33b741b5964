"""What a recorder is, and what it may know of a layer."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

ForwardExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Moment(enum.Enum):
    """When a recorder sees a call of its layer: before the kernel, in its place, when it is just over, or, with the
    weighted rows, where the kernel adds them."""

    BEFORE = enum.auto()
    INSTEAD = enum.auto()
    AFTER = enum.auto()
    AT_SUM = enum.auto()


class KernelOutput(Protocol):
    """Where a layer's kernel leaves the outputs of its latest call.

    Attributes:
        row_bytes: Of one output.
    """

    row_bytes: int

    def read(self, num_routes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs [N, H], float32, and which of them belongs to each route [N], in the order of the ids.

        Raises:
            ValueError: The kernel did not leave so many.
        """


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a layer's routed tokens look like.

    Attributes:
        hidden: Width of the experts' input.
        top_k: Experts per token.
        dtype: Of the input.
    """

    hidden: int
    top_k: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a token of one layer: input, gate weights in float32, ids in int32."""
        return self.hidden * self.dtype.itemsize + 8 * self.top_k


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
        expert_map_E: Local index of each expert, -1 for those of other ranks; None where all are here. Where experts
            have replicas, of each replica.
        complete_sizes: Adds up what expert-parallel ranks have measured, each of its own experts; None where each rank
            counts its own.
        replica_of: Which replica of each expert to ask, by the ids of experts; None where there is one of each.
        kernel_output: Where the kernel leaves its outputs, None where it does not.
        adds_apart: The kernel adds a token's weighted outputs in a method of its own, `moe_sum`.
        call_rows: Rows of one call of the kernel at most, where vLLM has locked its workspace; None where it grows.
        shape: Of its input, None where that is not known before a step.
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
    complete_sizes: Callable[[torch.Tensor], torch.Tensor] | None = None
    replica_of: Callable[[torch.Tensor], torch.Tensor] | None = None
    kernel_output: KernelOutput | None = None
    adds_apart: bool = False
    call_rows: int | None = None
    shape: RowShape | None = None


class Recorder(Protocol):
    """Turns the routed tokens of one layer into sums.

    Attributes:
        moment: When it sees the layer's calls.
    """

    moment: ClassVar[Moment]

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor | None:
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
