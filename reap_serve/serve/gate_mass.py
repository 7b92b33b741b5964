"""How much of the router's choice falls on dropped experts.

For one layer, the dropped gate mass fraction is the sum of g over the chosen experts that a plan drops, divided by the
sum of g over all chosen experts, where g is the gate weight of the full router. The fraction of a slice is the mean
over the layers. On the full model it is the dropped share of `gate_sum` in the statistics, so a plan can predict it.

Axes: L layers, Z slots (slice, phase; the last one is trash), T tokens, K experts per token; C columns, the dropped
mass and all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reap_serve.statistics.record import PHASES

# After so many tokens what was measured before them counts half: traffic that moves shows within a few thousand tokens.
HALF_LIFE_TOKENS = 20_000


class GateMass:
    """Decaying sums of dropped and of all gate mass.

    Args:
        num_layers: Layers of this process.
        num_slots: Slots, without the trash slot.
        device: Where the gate weights are.
    """

    def __init__(self, num_layers: int, num_slots: int, device: torch.device) -> None:
        self._sums_LZC = torch.zeros(num_layers, num_slots + 1, 2, dtype=torch.float64, device=device)
        self.tokens = 0
        self._decayed_tokens = 0

    @classmethod
    def of(cls, sums_LZC: torch.Tensor) -> GateMass:
        """Sums of nothing in memory that is there, where a graph adds to them."""
        mass = cls(0, 0, sums_LZC.device)
        mass._sums_LZC = sums_LZC
        mass.reset()
        return mass

    def add(self, layer: int, slot_T: torch.Tensor, weights_TK: torch.Tensor, dropped_TK: torch.Tensor) -> None:
        """Adds one layer's view of some tokens.

        Args:
            layer: Position of the layer in this process.
            slot_T: Slot of each token, int64.
            weights_TK: Gate weights of the full router.
            dropped_TK: Whether the chosen expert is a dropped one.
        """
        add_mass(self._sums_LZC[layer], slot_T, weights_TK, dropped_TK)
        if layer == 0:
            self.tokens += slot_T.shape[0]

    def fractions(self, slices: Sequence[str]) -> dict[str, float]:
        """The fraction by slice, both phases together; slices without a measured token are absent."""
        phases = len(PHASES)
        sums_LZC = self._sums_LZC[:, :-1].cpu()
        sums_LSC = sums_LZC.reshape(sums_LZC.shape[0], -1, phases, 2).sum(dim=2)
        found: dict[str, float] = {}
        for index, name in enumerate(slices):
            dropped_L, mass_L = sums_LSC[:, index].unbind(dim=1)
            seen_L = mass_L > 0
            if bool(seen_L.any()):
                found[name] = float((dropped_L[seen_L] / mass_L[seen_L]).mean())
        return found

    def decay(self) -> None:
        """Lets what was measured fade by the tokens that came since the last call."""
        new, self._decayed_tokens = self.tokens - self._decayed_tokens, self.tokens
        self._sums_LZC *= 0.5 ** (new / HALF_LIFE_TOKENS)

    def reset(self) -> None:
        """Sums of nothing."""
        self._sums_LZC.zero_()


def add_mass(sums_ZC: torch.Tensor, slot_T: torch.Tensor, weights_TK: torch.Tensor, dropped_TK: torch.Tensor) -> None:
    """Adds some tokens to one layer's sums; see `GateMass.add`. A graph can replay it."""
    mass_TK = weights_TK.double().abs()
    dropped_T = torch.where(dropped_TK, mass_TK, 0.0).sum(dim=1)
    sums_ZC.index_add_(0, slot_T, torch.stack((dropped_T, mass_TK.sum(dim=1)), dim=1))
