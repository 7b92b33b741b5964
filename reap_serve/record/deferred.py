"""The `deferred` recorder: the served computation is left untouched.

Sampled tokens' inputs, expert ids and gate weights are copied into a buffer in memory; when it is full, one expanded
kernel call measures them all, so that in decode each expert's weights are read once for hundreds of tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.expand import counted, expert_rows, measure_rows
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.record.recorder import LayerFacts, Moment
from reap_serve.record.sampling import RowSampler


class DeferredRecorder:
    """Copies sampled tokens now, measures them later.

    Args:
        layer: The layer.
        sums: Where to add.
        sampler: Labels and sample of the current step's rows.
        buffer_tokens: Tokens held before they are measured.
        extra: Where to add the optional sums, None without them.
    """

    moment: ClassVar[Moment] = Moment.BEFORE

    def __init__(
        self,
        layer: LayerFacts,
        sums: LayerSums,
        sampler: RowSampler,
        buffer_tokens: int,
        extra: ExtraSums | None = None,
    ) -> None:
        self._layer = layer
        self._sums = sums
        self._sampler = sampler
        self._extra = extra
        self._capacity = buffer_tokens
        self._held = 0
        self._x: torch.Tensor | None = None
        self._gate = torch.empty(buffer_tokens, layer.top_k, dtype=torch.float32, device=sums.tokens_S.device)
        self._ids = torch.empty(buffer_tokens, layer.top_k, dtype=torch.int32, device=sums.tokens_S.device)
        self._slot = torch.empty(buffer_tokens, dtype=torch.int64, device=sums.tokens_S.device)

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Copies the sampled rows of this step; the layer computes its own output."""
        sample = self._sampler.sampled_rows(x_TH.shape[0])
        if sample is None:
            return
        if self._x is None:
            self._x = torch.empty(self._capacity, x_TH.shape[1], dtype=x_TH.dtype, device=x_TH.device)
        start, num_rows = 0, sample.rows.shape[0]
        while start < num_rows:
            taken = min(num_rows - start, self._capacity - self._held)
            rows, held = sample.rows[start : start + taken], slice(self._held, self._held + taken)
            torch.index_select(x_TH, 0, rows, out=self._x[held])
            self._gate[held] = gate_TK[rows]
            self._ids[held] = expert_ids_TK[rows]
            self._slot[held] = sample.slots[start : start + taken]
            self._held += taken
            start += taken
            if self._held == self._capacity:
                self.flush()

    def flush(self) -> None:
        """Measures the buffer."""
        if self._held == 0 or self._x is None:
            return
        held, self._held = self._held, 0
        gate_TK, ids_TK = self._gate[:held], self._ids[:held]
        weight_TK = gate_TK if self._layer.weight_on_input else torch.ones_like(gate_TK)
        rows_TKH = expert_rows(self._layer, self._x[:held], weight_TK, ids_TK)
        measures = measure_rows(self._layer, rows_TKH, gate_TK, weighted=False)
        ids_TK, measures = counted(self._layer, ids_TK, measures)
        self._sums.add(self._slot[:held], ids_TK, measures)
        if self._extra is not None:
            self._extra.add_rows(self._slot[:held], ids_TK, rows_TKH, None)
