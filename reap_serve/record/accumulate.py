"""The sums of one layer, on the device of the layer, in float64.

Axes: S slots (slice, phase; the last one is trash), T tokens, K experts per token, N = T*K rows, E experts, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.record.verdicts import Verdicts
from reap_serve.statistics.record import EXPERT_SUMS
from reap_serve.statistics.sums import Merge, Of

# The sums over routes as `statistics.record` declares them: those that are added, and those of which the largest stays.
_OF_ROUTES = tuple(each for each in EXPERT_SUMS if each.of is Of.ROUTES)
SUM_COLUMNS = tuple(each.name for each in _OF_ROUTES if each.merge is Merge.ADD)
MAX_COLUMNS = tuple(each.name for each in _OF_ROUTES if each.merge is Merge.MAX)


@dataclass(frozen=True, slots=True)
class RowMeasures:
    """What one route (token t, its k-th expert) contributes.

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

    def widened(self) -> RowMeasures:
        """The same in float64, in which sums are kept."""
        return RowMeasures(
            self.gate_TK.double(), self.norm_TK.double(), self.weighted_norm_TK.double(), self.activation_TK.double()
        )


# The formula of each: what one route adds, or the largest of which stays.
FORMULAS: Mapping[str, Callable[[RowMeasures], torch.Tensor]] = {
    "token_count": lambda route: torch.ones_like(route.gate_TK),
    "gate_sum": lambda route: route.gate_TK,
    "norm_sum": lambda route: route.norm_TK,
    "norm_sq_sum": lambda route: route.norm_TK.square(),
    "weighted_norm_sum": lambda route: route.weighted_norm_TK,
    "weighted_norm_sq_sum": lambda route: route.weighted_norm_TK.square(),
    "norm_max": lambda route: route.norm_TK,
    "activation_max": lambda route: route.activation_TK,
}


class LayerSums:
    """Sums over the rows of one layer; every update has fixed shapes and works in place.

    Args:
        num_slots: Slots, without the trash slot.
        num_experts: Experts of the layer.
        device: Where the layer's outputs are.
        verdicts: Of an engine with draft tokens: while a step awaits its verdict, what is added waits, too.

    Attributes:
        sums_SEC: The columns of `SUM_COLUMNS`, float64.
        maxima_SEC: The columns of `MAX_COLUMNS`, float32.
        tokens_S: Tokens, int64.
    """

    def __init__(
        self, num_slots: int, num_experts: int, device: torch.device, verdicts: Verdicts | None = None
    ) -> None:
        self._verdicts = verdicts
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, RowMeasures]] = []
        self.num_slots = num_slots
        self.num_experts = num_experts
        shape = (num_slots + 1, num_experts)
        # Explicit dtypes: the default dtype is bfloat16 while vLLM builds a model.
        sums_CSE = torch.zeros(len(SUM_COLUMNS), *shape, dtype=torch.float64, device=device)
        maxima_CSE = torch.zeros(len(MAX_COLUMNS), *shape, dtype=torch.float32, device=device)
        self.sums_SEC, self.maxima_SEC = sums_CSE.permute(1, 2, 0), maxima_CSE.permute(1, 2, 0)
        # Of each column, all places as one list: PyTorch adds rows of several numbers a hundred times as slowly.
        self._sums = sums_CSE.flatten(1).unbind()
        self._maxima = maxima_CSE.flatten(1).unbind()
        self.tokens_S = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def add(self, slot_T: torch.Tensor, expert_ids_TK: torch.Tensor, rows: RowMeasures) -> None:
        """Adds the rows of some tokens.

        Args:
            slot_T: Slot of each token, or the ticket of a draft token, int64.
            expert_ids_TK: Chosen experts; -1 for a route that vLLM padded, which goes to the trash.
            rows: The measures.
        """
        if self._verdicts is not None:
            if self._verdicts.pending:
                # Both may be views of a buffer.
                self._waiting.append((slot_T.clone(), expert_ids_TK.clone(), rows))
                return
            slot_T = self._verdicts.slots(slot_T)
        index_TK = slot_T.unsqueeze(1) * self.num_experts + expert_ids_TK
        index_N = torch.where(expert_ids_TK < 0, self.num_slots * self.num_experts, index_TK).view(-1)
        widened = rows.widened()
        for name, sums in zip(SUM_COLUMNS, self._sums, strict=True):
            sums.index_add_(0, index_N, FORMULAS[name](widened).reshape(-1))
        for name, maxima in zip(MAX_COLUMNS, self._maxima, strict=True):
            maxima.scatter_reduce_(0, index_N, FORMULAS[name](rows).reshape(-1), reduce="amax")
        self.tokens_S.index_add_(0, slot_T, torch.ones_like(slot_T))

    def settle(self) -> None:
        """Adds what waited for a verdict, which is there."""
        waiting, self._waiting = self._waiting, []
        for slot_T, expert_ids_TK, rows in waiting:
            self.add(slot_T, expert_ids_TK, rows)

    def expert_counts(self) -> npt.NDArray[np.int64]:
        """Routed tokens of each expert over all slots, without the trash."""
        return self.sums_SEC[: self.num_slots, :, 0].sum(dim=0).cpu().numpy().astype(np.int64)

    def reset(self) -> None:
        """Sums of nothing, in the same memory."""
        self.sums_SEC.zero_()
        self.maxima_SEC.zero_()
        self.tokens_S.zero_()
