"""The recorder that reads: the kernel computed every row, and left them in memory.

The served computation is the plain one, bit for bit, whatever share of the tokens is recorded. It stands in for
`inline` and `deferred` where `kernel_rows` finds the rows: nothing is computed twice, copied or held back.

Axes: T tokens, K experts per token, N = T*K rows, H hidden.
"""

from __future__ import annotations

import torch

from reap_serve.observe.accumulate import LayerSums, RowMeasures
from reap_serve.observe.kernel_rows import KernelRows
from reap_serve.observe.recorder import LayerFacts
from reap_serve.observe.row_sizes import row_sizes
from reap_serve.observe.sampling import RowSampler


class ReadRecorder:
    """Measures the rows of a kernel call that is just over.

    Args:
        layer: The layer.
        sums: Where to add.
        sampler: Labels and sample of the current step's rows.
        rows: Where the rows are.
    """

    def __init__(self, layer: LayerFacts, sums: LayerSums, sampler: RowSampler, rows: KernelRows) -> None:
        self._layer = layer
        self._sums = sums
        self._sampler = sampler
        self._rows = rows

    def observe(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Measures the sampled rows of this step; the kernel has just computed them.

        Args:
            x_TH: Input of the experts.
            gate_TK: The router's weights, float32.
            expert_ids_TK: Chosen experts.
        """
        sample = self._sampler.sampled_rows(x_TH.shape[0])
        if sample is None:
            return
        rows_NH, row_of_slot_N = self._rows.read(expert_ids_TK.numel())
        if sample.rows.shape[0] == x_TH.shape[0]:
            size_N, largest_N = self._measure(rows_NH)
            size_N, largest_N = size_N.index_select(0, row_of_slot_N), largest_N.index_select(0, row_of_slot_N)
        else:
            gate_TK, expert_ids_TK = gate_TK[sample.rows], expert_ids_TK[sample.rows]
            row_N = row_of_slot_N.view(x_TH.shape[0], -1)[sample.rows].reshape(-1)
            size_N, largest_N = self._measure(rows_NH.index_select(0, row_N))
        size_TK, largest_TK = size_N.view(expert_ids_TK.shape), largest_N.view(expert_ids_TK.shape)
        applied_TK = gate_TK * self._layer.gate_scale
        # A weight on the input is in the row already: f(g*x) counts as the plain and as the weighted output.
        weighted_TK = size_TK * (self._layer.gate_scale if self._layer.weight_on_input else applied_TK.abs())
        self._sums.add(sample.slots, expert_ids_TK, RowMeasures(applied_TK, size_TK, weighted_TK, largest_TK))

    def flush(self) -> None:
        """Nothing is held back."""

    def _measure(self, rows_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._layer.complete_rows is not None:
            rows_NH = self._layer.complete_rows(rows_NH)
        return row_sizes(rows_NH)
