"""The optional sums of one layer: what merging needs and pruning does not.

They are H or E times larger than the others, so that a slot gets memory with its first token. Nothing here runs unless
`ObserveSettings.extra_sums` asks for it.

Axes: T tokens, K experts per token, E experts, H hidden, N = T*K routes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.record.sampling import RowSampler
from reap_serve.statistics.record import EXPERT_SUMS
from reap_serve.statistics.sums import Of, Sum

# Outputs are widened to float64 block by block.
BLOCK_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True)
class RoutedOutputs:
    """What sums of outputs are made of: some tokens of one slot.

    Attributes:
        ids_TK: Chosen experts, int64; -1 for a route that vLLM padded.
        rows_TKH: Their outputs.
        weight_TK: Weights that the outputs carry, None when they carry none.
    """

    ids_TK: torch.Tensor
    rows_TKH: torch.Tensor
    weight_TK: torch.Tensor | None


def _add_pairs(total_EE: torch.Tensor, tokens: RoutedOutputs) -> None:
    """`coselection_count` [E, E] counts tokens routed to both experts."""
    num_experts = total_EE.shape[0]
    chosen_TE = torch.zeros(tokens.ids_TK.shape[0], num_experts + 1, dtype=torch.float64, device=total_EE.device)
    chosen_TE.scatter_(1, torch.where(tokens.ids_TK < 0, num_experts, tokens.ids_TK), 1.0)
    chosen_TE = chosen_TE[:, :num_experts]
    total_EE.addmm_(chosen_TE.T, chosen_TE)


def _add_outputs(total_EH: torch.Tensor, tokens: RoutedOutputs) -> None:
    """`output_sum` [E, H] is the sum of f, the expert's output before weighting."""
    hidden = total_EH.shape[1]
    real_N = tokens.ids_TK.reshape(-1) >= 0
    ids_N, rows_NH = tokens.ids_TK.reshape(-1)[real_N], tokens.rows_TKH.reshape(-1, hidden)[real_N]
    inverse_N = None
    if tokens.weight_TK is not None:
        # As in `measure_rows`: a weight of 0 leaves no trace of the output.
        weight_N = tokens.weight_TK.reshape(-1)[real_N].double()
        inverse_N = torch.where(weight_N == 0, 0.0, 1.0 / weight_N)
    step = max(1, BLOCK_ELEMENTS // hidden)
    for start in range(0, ids_N.shape[0], step):
        block_NH = rows_NH[start : start + step].double()
        if inverse_N is not None:
            block_NH *= inverse_N[start : start + step, None]
        total_EH.index_add_(0, ids_N[start : start + step], block_NH)


def _add_logit_products(total_EE: torch.Tensor, logits_TE: torch.Tensor) -> None:
    """`logit_gram` [E, E] is the sum of z z' over the tokens of the layer, z the router's logits: the cosine of two
    experts' logits over the tokens is gram[i, j] / sqrt(gram[i, i] gram[j, j])."""
    logits_TE = logits_TE.double()
    total_EE.addmm_(logits_TE.T, logits_TE)


# The formula of each optional sum: adds some tokens of one slot to the slot's total.
OUTPUT_FORMULAS: Mapping[str, Callable[[torch.Tensor, RoutedOutputs], None]] = {
    "output_sum": _add_outputs,
    "coselection_count": _add_pairs,
}
LOGIT_FORMULAS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]] = {"logit_gram": _add_logit_products}


class ExtraSums:
    """Optional sums of one layer, by slot.

    Args:
        wanted: Which ones; none costs nothing.
        trash_slot: Slot of rows that do not count.
        num_experts: Experts of the layer.
        device: Where the layer's outputs are.
    """

    def __init__(self, wanted: Collection[str], trash_slot: int, num_experts: int, device: torch.device) -> None:
        self._of_outputs = [each for each in EXPERT_SUMS if each.name in wanted and each.of is Of.OUTPUTS]
        self._of_logits = [each for each in EXPERT_SUMS if each.name in wanted and each.of is Of.LOGITS]
        self._trash_slot = trash_slot
        self._num_experts = num_experts
        self._device = device
        self._sums: dict[tuple[str, int], torch.Tensor] = {}

    def add_rows(
        self, slot_T: torch.Tensor, ids_TK: torch.Tensor, rows_TKH: torch.Tensor, weight_TK: torch.Tensor | None
    ) -> None:
        """Adds the outputs of some tokens' experts.

        Args:
            slot_T: Slot of each token, int64.
            ids_TK: Chosen experts; -1 for a route that vLLM padded.
            rows_TKH: Their outputs.
            weight_TK: Weights that the rows carry, None when they carry none.
        """
        if not self._of_outputs:
            return
        for slot in self._slots(slot_T):
            here = slot_T == slot
            weight = None if weight_TK is None else weight_TK[here]
            tokens = RoutedOutputs(ids_TK[here].long(), rows_TKH[here], weight)
            for each in self._of_outputs:
                OUTPUT_FORMULAS[each.name](self._sum(each, slot, rows_TKH.shape[-1]), tokens)

    def add_logits(self, slot_T: torch.Tensor, logits_TE: torch.Tensor) -> None:
        """Adds the router's logits of some tokens."""
        for slot in self._slots(slot_T):
            for each in self._of_logits:
                LOGIT_FORMULAS[each.name](self._sum(each, slot), logits_TE[slot_T == slot])

    def arrays(self, num_slots: int) -> dict[str, npt.NDArray[np.float64]]:
        """Copies of the first slots' sums in the main memory, [slots, E, ...]; those never added to are absent."""
        found: dict[str, npt.NDArray[np.float64]] = {}
        for each in (*self._of_outputs, *self._of_logits):
            used = {slot: values for (name, slot), values in self._sums.items() if name == each.name}
            used = {slot: values for slot, values in used.items() if slot < num_slots}
            if used:
                array = np.zeros((num_slots, *next(iter(used.values())).shape))
                for slot, values in used.items():
                    array[slot] = values.cpu().numpy()
                found[each.name] = array
        return found

    def reset(self) -> None:
        """Sums of nothing; the memory is given back."""
        self._sums.clear()

    def _slots(self, slot_T: torch.Tensor) -> list[int]:
        return [slot for slot in torch.unique(slot_T).tolist() if slot != self._trash_slot]

    def _sum(self, each: Sum, slot: int, hidden: int = 0) -> torch.Tensor:
        if (each.name, slot) not in self._sums:
            shape = each.stored_shape(1, self._num_experts, (hidden,))[1:]
            self._sums[each.name, slot] = torch.zeros(shape, dtype=torch.float64, device=self._device)
        return self._sums[each.name, slot]


class LogitTap:
    """Shows a router's logits of the sampled tokens to the optional sums.

    Args:
        sums: Where to add.
        sampler: Labels and sample of the current step's rows.
        guarded: Runs an action behind the hook boundary; see `StepRecorder.guarded`.
    """

    def __init__(
        self, sums: ExtraSums, sampler: RowSampler, guarded: Callable[[Callable[[], torch.Tensor | None]], object]
    ) -> None:
        self._sums = sums
        self._sampler = sampler
        self._guarded = guarded

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor
    ) -> None:
        """Sees one call of the router; writes nothing and never raises."""
        self._guarded(lambda: self._add(logits_TE))

    def _add(self, logits_TE: torch.Tensor) -> None:
        sample = self._sampler.sampled_rows(logits_TE.shape[0])
        if sample is not None:
            self._sums.add_logits(sample.slots, logits_TE[sample.rows])
