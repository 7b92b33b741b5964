"""The recorder that reads: the kernel computed every row, and left them in memory.

The served computation is the plain one, bit for bit, whatever share of the tokens is recorded. It stands in for
`inline` and `deferred` where the adapter finds the rows: nothing is computed twice.

Axes: T tokens, K experts per token, N = T*K rows, H hidden.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from reap_serve.record.accumulate import LayerSums, RowMeasures
from reap_serve.record.recorder import KernelOutput, LayerFacts, Moment
from reap_serve.record.row_sizes import row_sizes
from reap_serve.record.sampling import RowSampler


class ReadRecorder:
    """Measures the rows of a kernel call that is just over.

    To measure a few rows takes as long as to measure a thousand: some twenty operations, each too short for its cost.
    So a step of few tokens has its rows copied into a buffer, which is measured when it is full.

    Args:
        layer: The layer.
        sums: Where to add.
        sampler: Labels and sample of the current step's rows.
        rows: Where the rows are.
        held_tokens: Tokens whose rows the buffer holds; a step that samples more is measured at once.
    """

    moment: ClassVar[Moment] = Moment.AFTER

    def __init__(
        self, layer: LayerFacts, sums: LayerSums, sampler: RowSampler, rows: KernelOutput, held_tokens: int
    ) -> None:
        self._layer = layer
        self._sums = sums
        self._sampler = sampler
        self._rows = rows
        self._capacity = held_tokens
        self._held = 0
        # NumPy copies a few numbers in a fifth of the time that PyTorch takes.
        self._held_rows_NH = np.empty((0, 0), np.float32)
        self._held_gate_TK = np.empty((held_tokens, layer.top_k), np.float32)
        self._held_ids_TK = np.empty((held_tokens, layer.top_k), np.int32)
        self._held_slot_T = np.empty(held_tokens, np.int64)

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Takes the sampled rows of this step; the kernel has just computed them.

        Args:
            x_TH: Input of the experts.
            gate_TK: The router's weights, float32.
            expert_ids_TK: Chosen experts.
        """
        sample = self._sampler.sampled_rows(x_TH.shape[0])
        if sample is None:
            return
        rows_NH, row_of_route_N = self._rows.read(expert_ids_TK.numel())
        num_tokens = sample.rows.shape[0]
        whole = num_tokens == x_TH.shape[0]
        if not whole:
            gate_TK, expert_ids_TK = gate_TK[sample.rows], expert_ids_TK[sample.rows]
            row_of_route_N = row_of_route_N.view(x_TH.shape[0], -1)[sample.rows].reshape(-1)
        if num_tokens <= self._capacity:
            self._hold(rows_NH, row_of_route_N, gate_TK, expert_ids_TK, sample.slots)
        elif whole:
            size_N, largest_N = self._measure(rows_NH)
            size_N, largest_N = size_N.index_select(0, row_of_route_N), largest_N.index_select(0, row_of_route_N)
            self._add(sample.slots, gate_TK, expert_ids_TK, size_N, largest_N)
        else:
            measured = self._measure(rows_NH.index_select(0, row_of_route_N))
            self._add(sample.slots, gate_TK, expert_ids_TK, *measured)

    def flush(self) -> None:
        """Measures the buffer."""
        if self._held == 0:
            return
        held, self._held = self._held, 0
        rows_NH = torch.from_numpy(self._held_rows_NH[: held * self._layer.top_k])
        slot_T, gate_TK, ids_TK = map(torch.from_numpy, (self._held_slot_T, self._held_gate_TK, self._held_ids_TK))
        self._add(slot_T[:held], gate_TK[:held], ids_TK[:held], *self._measure(rows_NH))

    def _hold(
        self,
        rows_NH: torch.Tensor,
        row_of_route_N: torch.Tensor,
        gate_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        slot_T: torch.Tensor,
    ) -> None:
        start, stop = self._held, self._held + slot_T.shape[0]
        if stop > self._capacity:
            self.flush()
            start, stop = 0, slot_T.shape[0]
        top_k, hidden = gate_TK.shape[1], rows_NH.shape[1]
        if self._held_rows_NH.shape[0] == 0:
            self._held_rows_NH = np.empty((self._capacity * top_k, hidden), np.float32)
        held_rows_NH = self._held_rows_NH[start * top_k : stop * top_k]
        # With mode="raise" NumPy would copy the rows twice.
        np.take(rows_NH.numpy(), row_of_route_N.numpy(), axis=0, out=held_rows_NH, mode="clip")
        self._held_gate_TK[start:stop] = gate_TK.numpy()
        self._held_ids_TK[start:stop] = ids_TK.numpy()
        self._held_slot_T[start:stop] = slot_T.numpy()
        self._held = stop

    def _measure(self, rows_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._layer.complete_rows is not None:
            rows_NH = self._layer.complete_rows(rows_NH)
        return row_sizes(rows_NH)

    def _add(
        self,
        slot_T: torch.Tensor,
        gate_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        size_N: torch.Tensor,
        largest_N: torch.Tensor,
    ) -> None:
        size_TK, largest_TK = size_N.view(ids_TK.shape), largest_N.view(ids_TK.shape)
        applied_TK = gate_TK * self._layer.gate_scale
        # A weight on the input is in the row already: f(g*x) counts as the plain and as the weighted output.
        weighted_TK = size_TK * (self._layer.gate_scale if self._layer.weight_on_input else applied_TK.abs())
        self._sums.add(slot_T, ids_TK, RowMeasures(applied_TK, size_TK, weighted_TK, largest_TK))
