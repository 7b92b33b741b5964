"""The `deferred` recorder where steps are replayed from CUDA graphs, in which no Python runs.

Captured with each layer is a gather of fixed shape: the rows of its input, gate weights and expert ids at a persistent
index go to a persistent landing buffer. Before a step the host writes the sampled rows into the index; after it, what
landed is copied for all layers at once, and measured when the buffer is full, by the same kernel with one row a routed
slot, outside of graphs. A step that is not sampled gathers what nobody reads. The served computation reads none of it.

A step of more tokens than any graph has runs in Python: there each layer's rows are copied, or measured, as they are.

Not yet run on a GPU; tests/unit/record/graph_replay.py captures and replays on a CPU what a graph would.

Axes: T tokens, K experts per token, H hidden, N rows.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.captured_rows import CapturedRows
from reap_serve.record.expand import expert_rows, local_ids, measure_rows
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.record.recorder import LayerFacts, Moment
from reap_serve.record.sampling import RowSampler

# Of one call of a kernel whose workspace nothing bounds: what is measured at a time takes memory, too.
CALL_ROWS = 8192


class Measure:
    """Measures held rows of one layer by its own kernel, with one row a route.

    vLLM locks the kernels' workspace at the size that the largest step took. A call of no more rows than that step had
    tokens fits, whatever a kernel's workspace depends on; more rows are measured in several calls.

    Args:
        layer: The layer.
        sums: Where to add.
        extra: Where to add the optional sums, None without them.
    """

    def __init__(self, layer: LayerFacts, sums: LayerSums, extra: ExtraSums | None) -> None:
        self._layer = layer
        self._sums = sums
        self._extra = extra
        self._call_tokens = max(1, (layer.call_rows or CALL_ROWS) // layer.top_k)

    def __call__(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor, slot_T: torch.Tensor) -> None:
        """Adds the rows of some tokens to the sums."""
        for start in range(0, x_TH.shape[0], self._call_tokens):
            part = slice(start, start + self._call_tokens)
            gate, ids, slots = gate_TK[part], ids_TK[part], slot_T[part]
            weight = gate if self._layer.weight_on_input else torch.ones_like(gate)
            rows_TKH = expert_rows(self._layer, x_TH[part], weight, ids)
            self._sums.add(
                slots, local_ids(self._layer, ids), measure_rows(self._layer, rows_TKH, gate, weighted=False)
            )
            if self._extra is not None:
                self._extra.add_rows(slots, local_ids(self._layer, ids), rows_TKH, None)


class CapturedRecorder:
    """One layer's recorder.

    Args:
        layer: Its position among the layers of the process.
        rows: Of all layers.
        sampler: Labels and sample of the current step's rows.
        measure: Adds rows to the sums.

    Attributes:
        loaded: Whether it has gathered before.
    """

    moment: ClassVar[Moment] = Moment.BEFORE

    def __init__(self, layer: int, rows: CapturedRows, sampler: RowSampler, measure: Measure) -> None:
        self._position = layer
        self._rows = rows
        self._sampler = sampler
        self._measure = measure
        self.loaded = False
        rows.recorders.append(self)

    def gather(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """What graphs capture."""
        self._rows.gather(self._position, x_TH, gate_TK, expert_ids_TK)
        self.loaded = True

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Takes the sampled rows of a step that runs in Python; the layer computes its own output."""
        sample = self._sampler.sampled_rows(x_TH.shape[0])
        if sample is None:
            return
        x_NH, gate_NK, ids_NK = (values_TC.index_select(0, sample.rows) for values_TC in (x_TH, gate_TK, expert_ids_TK))
        if self._rows.takes(sample.rows.shape[0]):
            self._rows.hold(self._position, x_NH, gate_NK, ids_NK)
        else:
            self._measure(x_NH, gate_NK, ids_NK, sample.slots)

    def flush(self) -> None:
        """Measures what the layer holds."""
        held = self._rows.unmeasured(self._position)
        if held is not None:
            self._measure(*held)
