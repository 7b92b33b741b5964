"""The `inline` recorder: the layer's output is computed from rows that can be measured.

One expanded kernel call takes the place of the plain one; the sum over a token's K rows is the layer's output. It
equals the plain output up to the rounding of K rows to the layer's dtype, so that served outputs may differ in the last
bit.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.expand import add_rows, counted, expert_rows, measure_rows
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.record.recorder import LayerFacts, Moment
from reap_serve.record.sampling import RowSampler


class InlineRecorder:
    """Measures every token of a step while computing it.

    Args:
        layer: The layer.
        sums: Where to add.
        sampler: Labels of the current step's rows.
        extra: Where to add the optional sums, None without them.
    """

    moment: ClassVar[Moment] = Moment.INSTEAD

    def __init__(self, layer: LayerFacts, sums: LayerSums, sampler: RowSampler, extra: ExtraSums | None = None) -> None:
        self._layer = layer
        self._sums = sums
        self._sampler = sampler
        self._extra = extra

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor | None:
        """Computes the layer's output [T, H] from its rows and adds them to the sums; None when no row counts."""
        slot_T = self._sampler.all_slots(x_TH.shape[0])
        if slot_T is None:
            return None
        rows_TKH = expert_rows(self._layer, x_TH, gate_TK, expert_ids_TK)
        output_TH = add_rows(rows_TKH)
        measures = measure_rows(self._layer, rows_TKH, gate_TK, weighted=True)
        ids_TK, measures = counted(self._layer, expert_ids_TK, measures)
        self._sums.add(slot_T, ids_TK, measures)
        if self._extra is not None:
            weight_TK = None if self._layer.weight_on_input else gate_TK
            self._extra.add_rows(slot_T, ids_TK, rows_TKH, weight_TK)
        return output_TH

    def flush(self) -> None:
        """Nothing is held back."""
