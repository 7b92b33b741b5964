"""Deferred measurement of data-parallel ranks, which can only measure together.

Each rank holds back rows of its own tokens. To measure them, all experts are needed, which the ranks share: a kernel
call is a collective, with equal numbers of rows, at the same place of the same forward pass. Forward passes are such
places: a rank without requests runs dummy ones as long as another has some. So at the first layer of each, the ranks
tell each other what they hold, and all of them draw the same conclusion.

What a rank holds when all of them fall idle stays held until the next request; nothing is lost but by a kill.

Axes: T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.expand import expert_rows, measure_rows
from reap_serve.record.recorder import LayerFacts, Moment
from reap_serve.record.sampling import RowSampler


class Peers(Protocol):
    """The data-parallel ranks, this one included."""

    def exchange(self, mine: Sequence[int]) -> Sequence[Sequence[int]]:
        """The numbers of all ranks, this one's among them, in the order of the ranks. Collective."""

    def forward_of(self, num_rows: int) -> AbstractContextManager[None]:
        """Calls of a layer's kernel in this context take so many rows of every rank. Collective."""


class Lockstep:
    """Decides, alike on all ranks, when held rows are measured.

    They are when one rank asks for it, when they or the coming ones would not fit, and when no rank has real tokens. A
    step with more sampled rows than a buffer holds is measured in its layers, in rounds.

    Args:
        peers: The ranks.
        sampler: Labels and sample of the current step's rows.
        capacity: Tokens that a rank holds at most.
        failed: Called with what went wrong on this rank, which then only takes part.

    Attributes:
        recorders: One a layer, in the order of the model.
        wanted: Whether this rank asks for a measurement.
        answered: Whether one was made since it asked.
        held: Tokens that this rank holds.
        rounds: Tokens of each round of the current step; none in most steps.
    """

    def __init__(self, peers: Peers, sampler: RowSampler, capacity: int, failed: Callable[[Exception], None]) -> None:
        self.peers = peers
        self.sampler = sampler
        self.capacity = capacity
        self.recorders: list[LockstepRecorder] = []
        self.wanted = self.answered = False
        self.held = 0
        self.rounds: list[int] = []
        self._failed = failed

    def forward_begins(self) -> None:
        """The first layer of a forward pass was reached, on all ranks."""
        coming = self.sampler.num_sampled
        told = self.peers.exchange((self.held, coming, int(self.wanted), int(self.sampler.in_step)))
        most_held, most_coming = max(rank[0] for rank in told), max(rank[1] for rank in told)
        full = any(rank[0] + rank[1] > self.capacity for rank in told)
        asked, serving = any(rank[2] for rank in told), any(rank[3] for rank in told)
        if most_held and (full or asked or not serving):
            for recorder in self.recorders:
                recorder.measure(most_held)
            self.answered |= self.wanted
            self.held, self.wanted = 0, False
        self.rounds = []
        if most_coming > self.capacity:
            whole, rest = divmod(most_coming, self.capacity)
            self.rounds = [self.capacity] * whole + ([rest] if rest else [])
        else:
            self.held += coming

    def settle(self) -> bool:
        """Whether what was held when this was first called is measured; if not, it will be at the next forward pass."""
        settled = self.answered or self.held == 0
        self.answered, self.wanted = False, not settled
        return settled

    def discard(self) -> None:
        """Forgets the held rows unmeasured."""
        self.held, self.wanted, self.answered = 0, False, False
        for recorder in self.recorders:
            recorder.discard()

    def guarded(self, action: Callable[[], None]) -> None:
        """Runs what is no collective; what it raises must not keep this rank from the next one."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self._failed(error)


class LockstepRecorder:
    """Copies sampled tokens now; measures them when all ranks do.

    Args:
        layer: The layer.
        sums: Where to add.
        lockstep: Of the engine; this recorder joins its recorders.
    """

    moment: ClassVar[Moment] = Moment.BEFORE

    def __init__(self, layer: LayerFacts, sums: LayerSums, lockstep: Lockstep) -> None:
        self._layer = layer
        self._sums = sums
        self._lockstep = lockstep
        self._first = not lockstep.recorders
        lockstep.recorders.append(self)
        capacity, device = lockstep.capacity, sums.tokens_S.device
        self._held = 0
        self._x: torch.Tensor | None = None
        self._gate = torch.zeros(capacity, layer.top_k, dtype=torch.float32, device=device)
        self._ids = torch.zeros(capacity, layer.top_k, dtype=torch.int32, device=device)
        self._slot = torch.zeros(capacity, dtype=torch.int64, device=device)

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Copies the sampled rows of a forward pass; called in all of them, of dummy tokens, too."""
        if self._x is None:
            # Rows that stand in for missing ones have to be numbers.
            self._x = torch.zeros(self._lockstep.capacity, x_TH.shape[1], dtype=x_TH.dtype, device=x_TH.device)
        if self._first:
            self._lockstep.forward_begins()
        sample = self._lockstep.sampler.sampled_rows(x_TH.shape[0])
        rows = torch.empty(0, dtype=torch.int64, device=x_TH.device) if sample is None else sample.rows
        slots = rows if sample is None else sample.slots
        if not self._lockstep.rounds:
            self._lockstep.guarded(lambda: self._copy(x_TH, gate_TK, expert_ids_TK, rows, slots))
        start = 0
        for num_tokens in self._lockstep.rounds:
            part = slice(start, start + num_tokens)
            self._lockstep.guarded(lambda: self._copy(x_TH, gate_TK, expert_ids_TK, rows[part], slots[part]))  # noqa: B023
            self.measure(num_tokens)
            start += num_tokens

    def _copy(
        self,
        x_TH: torch.Tensor,
        gate_TK: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        assert self._x is not None
        held = slice(self._held, self._held + rows.shape[0])
        torch.index_select(x_TH, 0, rows, out=self._x[held])
        self._gate[held] = gate_TK[rows]
        self._ids[held] = expert_ids_TK[rows].int()
        self._slot[held] = slots
        self._held = held.stop

    def measure(self, num_tokens: int) -> None:
        """Measures the held tokens, with so many of every rank: what this one lacks is padded. Collective."""
        assert self._x is not None
        held, self._held = self._held, 0
        gate_TK, ids_TK = self._gate[:num_tokens], self._ids[:num_tokens]
        weight_TK = gate_TK if self._layer.weight_on_input else torch.ones_like(gate_TK)
        with self._lockstep.peers.forward_of(num_tokens * self._layer.top_k):
            rows_TKH = expert_rows(self._layer, self._x[:num_tokens], weight_TK, ids_TK)
        if held:
            self._lockstep.guarded(lambda: self._add(rows_TKH, held))

    def _add(self, rows_TKH: torch.Tensor, held: int) -> None:
        gate_TK, ids_TK = self._gate[:held], self._ids[:held]
        measures = measure_rows(self._layer, rows_TKH[:held], gate_TK, weighted=False)
        self._sums.add(self._slot[:held], ids_TK, measures)

    def flush(self) -> None:
        """Measures nothing by itself: see `Lockstep.settle`."""

    def discard(self) -> None:
        """Forgets the held tokens unmeasured."""
        self._held = 0
