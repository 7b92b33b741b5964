"""Which rows of the current step are recorded: the same ones in every layer."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.record.step import RowIndices, Slots
from reap_serve.record.verdicts import Verdicts

# Fewer tokens than these are not worth a step's fixed cost.
STEP_TOKENS = 64
NO_ROWS: RowIndices = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class RowSample:
    """Sampled rows of a step: their indices and their slots, both int64; the indices on the host, too."""

    rows: torch.Tensor
    slots: torch.Tensor
    host_rows: RowIndices


class RowSampler:
    """Chooses the rows of each step and holds their slots.

    Every real token is taken with the same probability p, the `fraction`. So a sum over the taken tokens, divided by p,
    is an unbiased estimate of the sum over all.

    To record a step costs about as much for few tokens as for many. So few steps are recorded, with many tokens each:

        a step of n tokens is taken with probability q = min(1, max(p, n p / STEP_TOKENS));
        of a taken step n p / q tokens are recorded, rounded up or down by chance.

    A taken step of up to STEP_TOKENS tokens is recorded as a whole; of a larger one STEP_TOKENS are, or n p where that
    is more. So a bound on p bounds the tokens of a step. In decode the tokens of a step belong to as many requests, and
    whole steps are no worse a sample than single tokens.

    Args:
        fraction: Probability with which a token is recorded.
        trash_slot: Slot of rows that do not count.
        device: Where the layers' inputs are.
        seed: Of the random choice.
        verdicts: Gives tickets to draft tokens, None in an engine without.

    Attributes:
        real_tokens: Tokens that count since the last reset.
        sampled_tokens: Those of them that were taken.
        in_step: Whether a step with real tokens runs.
    """

    def __init__(
        self,
        fraction: float,
        trash_slot: int,
        device: torch.device,
        seed: int = 0,
        verdicts: Verdicts | None = None,
    ) -> None:
        self._verdicts = verdicts
        self._draft_rows = self._ticket_rows = NO_ROWS
        self.fraction = fraction
        self.real_tokens = 0
        self.sampled_tokens = 0
        self.in_step = False
        self._trash_slot = trash_slot
        self._device = device
        self._random = np.random.default_rng(seed)
        # Single draws take NumPy's generator ten times as long.
        self._random_step = random.Random(seed)
        # The slots of the last step, and what was found out about them: decode steps that follow each other come with
        # the same array.
        self._step_slots = np.empty(0, np.int64)
        self._num_real = 0
        self._step_weight = 1.0
        self._whole: RowSample | None = None
        self._slots: torch.Tensor | None = None
        self._sample: RowSample | None = None

    def begin(self, slots: Slots, draft_rows: RowIndices = NO_ROWS) -> None:
        """A step with real tokens begins.

        Args:
            slots: Of its rows.
            draft_rows: Rows of draft tokens: they are counted by `tell`.
        """
        if slots is not self._step_slots:
            self._step_slots, self._whole = slots, None
            self._num_real = int(np.count_nonzero(slots != self._trash_slot))
            self._step_weight = max(1.0, self._num_real / STEP_TOKENS)
        self._draft_rows, self._ticket_rows = draft_rows, NO_ROWS
        self.real_tokens += self._num_real - self._real(draft_rows)
        self._slots = self._sample = None
        self.in_step = True
        if self._random_step.random() >= self.fraction * self._step_weight:
            return
        row_fraction = max(self.fraction, 1 / self._step_weight)
        if row_fraction == 1.0 and self._num_real == slots.shape[0] > 0 and not draft_rows.shape[0]:
            self._begin_whole(slots)
            return
        rows = np.flatnonzero(slots != self._trash_slot)
        if row_fraction < 1.0:
            # STEP_TOKENS / n times n is to be no more than STEP_TOKENS.
            count = int(round(rows.shape[0] * row_fraction, 6) + self._random.random())
            rows = np.sort(self._random.choice(rows, count, replace=False, shuffle=False))
        if rows.shape[0] == 0:
            return
        chosen = np.full(slots.shape[0], self._trash_slot, np.int64)
        chosen[rows] = slots[rows]
        if draft_rows.shape[0]:
            self._ticket_rows = np.intersect1d(rows, draft_rows)
        if self._ticket_rows.shape[0]:
            assert self._verdicts is not None
            chosen[self._ticket_rows] = self._verdicts.issue(slots[self._ticket_rows])
        self.sampled_tokens += rows.shape[0] - self._ticket_rows.shape[0]
        self._slots = self._tensor(chosen)
        self._sample = RowSample(self._tensor(rows), self._tensor(chosen[rows]), rows)

    def tell(self, taken_T: npt.NDArray[np.bool_]) -> None:
        """Which rows of the step count, now that its draft tokens were verified."""
        self.real_tokens += self._real(self._draft_rows[taken_T[self._draft_rows]])
        if self._verdicts is not None and self._verdicts.pending:
            taken = taken_T[self._ticket_rows]
            self.sampled_tokens += int(np.count_nonzero(taken))
            self._verdicts.tell(taken)
        self._draft_rows = self._ticket_rows = NO_ROWS

    def reject_drafts(self) -> None:
        """Takes none of the draft tokens of the last step, if they still await their verdict."""
        self.tell(np.zeros(self._step_slots.shape[0], np.bool_))

    def _real(self, rows: RowIndices) -> int:
        return int(np.count_nonzero(self._step_slots[rows] != self._trash_slot)) if rows.shape[0] else 0

    def _begin_whole(self, slots: Slots) -> None:
        """Takes every row of a step.

        Decode steps with the same slots share one sample: what is allocated in front of a forward pass and lives
        through it keeps glibc from using the memory around it again, at the cost of forty page faults a step.
        """
        if self._whole is None:
            rows = np.arange(slots.shape[0])
            self._whole = RowSample(self._tensor(rows), self._tensor(slots), rows)
        self._slots, self._sample = self._whole.slots, self._whole
        self.sampled_tokens += slots.shape[0]

    def _tensor(self, values: Slots) -> torch.Tensor:
        return to_device(values, self._device)

    @property
    def sample(self) -> RowSample | None:
        """The sampled rows of the current step, None when there are none."""
        return self._sample

    @property
    def active(self) -> bool:
        """Whether a row of the current step is recorded."""
        return self._sample is not None

    @property
    def num_sampled(self) -> int:
        """Sampled rows of the current step."""
        return 0 if self._sample is None else self._sample.rows.shape[0]

    def end(self) -> None:
        """The step is over: what runs now is a dummy or warm-up run, of which nothing counts."""
        self._slots = None
        self._sample = None
        self.in_step = False

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

    def reset(self, held_tokens: int = 0) -> None:
        """Forgets the counts.

        Args:
            held_tokens: Sampled ones that are not measured yet: they count on, with their share of the real ones.
        """
        share = held_tokens / self.sampled_tokens if held_tokens else 0.0
        self.real_tokens = round(share * self.real_tokens)
        self.sampled_tokens = held_tokens


def to_device(values: Slots, device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for: from page-locked memory, unless the device is a CPU."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
