"""The sums of one layer, on the device of the layer, in float64.

Axes: S slots (slice, phase; the last one is trash), T tokens, K experts per token, N = T*K rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

SUM_COLUMNS = ("token_count", "gate_sum", "norm_sum", "norm_sq_sum", "weighted_norm_sum", "weighted_norm_sq_sum")
MAX_COLUMNS = ("norm_max", "activation_max")


@dataclass(frozen=True, slots=True)
class RowMeasures:
    """What one routed slot (token t, its k-th expert) contributes.

    Attributes:
        gate_TK: Gate weight that the model applies, float32.
        norm_TK: 2-norm of the expert's output before weighting, float32.
        weighted_norm_TK: 2-norm after weighting: REAP's term, float32.
        activation_TK: Largest absolute component of the expert's output before weighting, float32.
    """

    gate_TK: torch.Tensor
    norm_TK: torch.Tensor
    weighted_norm_TK: torch.Tensor
    activation_TK: torch.Tensor


class LayerSums:
    """Sums over the rows of one layer; every update has fixed shapes and works in place.

    Args:
        num_slots: Slots, without the trash slot.
        num_experts: Experts of the layer.
        device: Where the layer's outputs are.
    """

    def __init__(self, num_slots: int, num_experts: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.num_experts = num_experts
        # Explicit dtypes: the default dtype is bfloat16 while vLLM builds a model.
        self.sums = torch.zeros((num_slots + 1) * num_experts, len(SUM_COLUMNS), dtype=torch.float64, device=device)
        self.maxima = torch.zeros((num_slots + 1) * num_experts, len(MAX_COLUMNS), dtype=torch.float32, device=device)
        # Places of count, gate, norm and weighted norm, then of the latter two's squares.
        self._columns_C = torch.tensor((0, 1, 2, 4, 3, 5), dtype=torch.int64, device=device)
        self.tokens_S = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def add(self, slot_T: torch.Tensor, expert_ids_TK: torch.Tensor, rows: RowMeasures) -> None:
        """Adds the rows of some tokens.

        Args:
            slot_T: Slot of each token, int64.
            expert_ids_TK: Chosen experts; -1 for a slot that vLLM padded, which goes to the trash.
            rows: The measures.
        """
        index_TK = slot_T.unsqueeze(1) * self.num_experts + expert_ids_TK
        index_N = torch.where(expert_ids_TK < 0, self.num_slots * self.num_experts, index_TK).reshape(-1)
        plain = (torch.ones_like(rows.gate_TK), rows.gate_TK, rows.norm_TK, rows.weighted_norm_TK)
        plain_N4 = torch.stack([measure.reshape(-1) for measure in plain], dim=1).double()
        columns_NC = torch.cat((plain_N4, plain_N4[:, 2:].square()), dim=1)
        # As one list of numbers: PyTorch adds rows of numbers one by one, a hundred times as slow.
        self.sums.view(-1).index_add_(
            0, (index_N.unsqueeze(1) * len(SUM_COLUMNS) + self._columns_C).view(-1), columns_NC.view(-1)
        )
        for number, measure in enumerate((rows.norm_TK, rows.activation_TK)):
            self.maxima[:, number].scatter_reduce_(0, index_N, measure.reshape(-1), reduce="amax")
        self.tokens_S.index_add_(0, slot_T, torch.ones_like(slot_T))

    def expert_counts(self) -> npt.NDArray[np.int64]:
        """Routed tokens of each expert over all slots, without the trash."""
        counts = self.sums[: self.num_slots * self.num_experts, 0].view(self.num_slots, self.num_experts).sum(dim=0)
        return counts.cpu().numpy().astype(np.int64)

    def reset(self) -> None:
        """Sums of nothing, in the same memory."""
        self.sums.zero_()
        self.maxima.zero_()
        self.tokens_S.zero_()
