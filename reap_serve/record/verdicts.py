"""Rows of which it is not yet known whether they count: the draft tokens of speculative decoding.

A step verifies draft tokens by running them; how many of a request's are taken, sampling tells after the forward pass.
Until then such a row has a ticket in place of its slot. What is measured in between waits; a ticket that was copied to
a buffer is looked up when the buffer is measured. Rejected rows go to the trash.

Axes: T rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.record.step import Slots


class Verdicts:
    """The tickets of one engine process: numbers above the trash slot, given out in turn.

    Args:
        trash_slot: Slot of rows that do not count.
        capacity: Tickets that buffers may hold at a time, those of the step included.
        device: Where the sums are.

    Attributes:
        pending: Whether a step awaits its verdict.
    """

    def __init__(self, trash_slot: int, capacity: int, device: torch.device) -> None:
        self.pending = False
        self._trash_slot = trash_slot
        self._capacity = capacity
        self._next = 0
        self._tickets = np.empty(0, np.int64)
        self._slots = np.empty(0, np.int64)
        self._slot_of_ticket = torch.full((trash_slot + 1 + capacity,), trash_slot, dtype=torch.int64, device=device)
        self._slot_of_ticket[:trash_slot] = torch.arange(trash_slot, dtype=torch.int64)

    def issue(self, slots: Slots) -> Slots:
        """Tickets for rows that will have these slots if they are taken; a verdict has to follow."""
        self.pending = True
        self._slots = slots
        self._tickets = self._trash_slot + 1 + (self._next + np.arange(slots.shape[0])) % self._capacity
        self._next = (self._next + slots.shape[0]) % self._capacity
        return self._tickets

    def tell(self, taken: npt.NDArray[np.bool_]) -> None:
        """The verdict on the rows whose tickets were issued last, in their order."""
        slots = np.where(taken, self._slots, self._trash_slot)
        self._slot_of_ticket[torch.from_numpy(self._tickets)] = torch.from_numpy(slots).to(self._slot_of_ticket.device)
        self.pending = False

    def slots(self, slot_T: torch.Tensor) -> torch.Tensor:
        """The slots with those of tickets in their place."""
        return self._slot_of_ticket[slot_T]
