"""Which rows of the current step are recorded: the same ones in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from reap_serve.observe.steps import Slots

# Fewer tokens than these are not worth a step's fixed cost.
STEP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class RowSample:
    """Sampled rows of a step: their indices and their slots, both int64."""

    rows: torch.Tensor
    slots: torch.Tensor


class RowSampler:
    """Holds the labels of the current step.

    Each real token is taken with probability `fraction`, so that every sum is an unbiased estimate, up to that factor,
    of the sum over all tokens. A step that has few tokens is taken as a whole or not at all, since what recording costs
    hardly depends on how few of them it takes; in decode its tokens belong to as many requests. Of n tokens, with the
    fraction p, a step is taken with probability q = min(1, max(p, n p / STEP_TOKENS)), each of its tokens with p / q.

    Args:
        fraction: Probability with which a token is recorded.
        trash_slot: Slot of rows that do not count.
        device: Where the layers' inputs are.
        seed: Of the random choice.
    """

    def __init__(self, fraction: float, trash_slot: int, device: torch.device, seed: int = 0) -> None:
        self.fraction = fraction
        self.real_tokens = 0
        self.sampled_tokens = 0
        self._trash_slot = trash_slot
        self._device = device
        self._random = np.random.default_rng(seed)
        self._slots: torch.Tensor | None = None
        self._sample: RowSample | None = None

    def begin(self, slots: Slots) -> None:
        """A step with real tokens begins."""
        real = slots != self._trash_slot
        num_real = int(np.count_nonzero(real))
        self.real_tokens += num_real
        if self.fraction < 1.0:
            step_fraction = min(1.0, max(self.fraction, num_real * self.fraction / STEP_TOKENS))
            if self._random.random() >= step_fraction:
                self.end()
                return
            chosen = real & (self._random.random(slots.shape[0]) < self.fraction / step_fraction)
        else:
            chosen = real
        rows = np.flatnonzero(chosen)
        self.sampled_tokens += rows.shape[0]
        if rows.shape[0] == 0:
            self.end()
            return
        labels = slots if rows.shape[0] == slots.shape[0] else np.where(chosen, slots, self._trash_slot)
        self._slots = torch.from_numpy(labels).to(self._device)
        self._sample = RowSample(
            torch.from_numpy(rows).to(self._device), torch.from_numpy(slots[rows]).to(self._device)
        )

    def end(self) -> None:
        """The step is over: what runs now is a dummy or warm-up run, of which nothing counts."""
        self._slots = None
        self._sample = None

    def all_slots(self, num_rows: int) -> torch.Tensor | None:
        """Slots of all rows of a layer call, padding rows appended as trash; None when no row counts."""
        slots = self._slots
        if slots is None or slots.shape[0] == num_rows:
            return slots
        padding = torch.full((num_rows - slots.shape[0],), self._trash_slot, dtype=torch.int64, device=self._device)
        return torch.cat((slots, padding))

    def sampled_rows(self, num_rows: int) -> RowSample | None:
        """The sampled rows of a layer call; None when there are none."""
        assert self._slots is None or self._slots.shape[0] <= num_rows, "a layer saw fewer rows than the step has"
        return self._sample

    def reset(self) -> None:
        """Forgets the counts."""
        self.real_tokens = 0
        self.sampled_tokens = 0
