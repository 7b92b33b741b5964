"""The `moe_sum` recorder: reads g*f of every route where a GPU kernel has it.

vLLM's Triton and Marlin experts write one weighted row a route and add a token's rows in `moe_sum`. The recorder stands
in front of that reduction. Under CUDA graphs its Python runs only while a graph is captured, so that everything it does
is an operation of fixed shape on tensors that stay where they are; which rows count is data: `PersistentSlots`.

Not yet run on a GPU.

Axes: T tokens, K experts per token, H hidden, E experts.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.expand import counted, local_ids, measure_rows
from reap_serve.record.recorder import LayerFacts, Moment
from reap_serve.record.sampling import NO_ROWS, RowSampler
from reap_serve.record.step import RowIndices, Slots


class PersistentSlots(RowSampler):
    """The slots of the current step in one tensor that never moves; outside of a step every row is trash.

    Args:
        fraction: Probability with which a token is recorded.
        trash_slot: Slot of rows that do not count.
        device: Where the layers' inputs are.
        max_rows: Rows of the largest step, padding included.
    """

    def __init__(self, fraction: float, trash_slot: int, device: torch.device, max_rows: int) -> None:
        super().__init__(fraction, trash_slot, device)
        self._buffer = torch.full((max_rows,), trash_slot, dtype=torch.int64, device=device)

    def begin(self, slots: Slots, draft_rows: RowIndices = NO_ROWS) -> None:
        """A step with real tokens begins; there are no draft tokens, since a graph's rows cannot wait."""
        super().begin(slots, draft_rows)
        padded = super().all_slots(slots.shape[0])
        self._buffer.fill_(self._trash_slot)
        if padded is not None:
            self._buffer[: slots.shape[0]].copy_(padded)

    def end(self) -> None:
        """The step is over."""
        super().end()
        if hasattr(self, "_buffer"):
            self._buffer.fill_(self._trash_slot)

    def all_slots(self, num_rows: int) -> torch.Tensor:
        """Slots of the rows of a layer call: a view, valid for every later replay."""
        if num_rows > self._buffer.shape[0]:
            raise ValueError(f"a layer saw {num_rows} rows, {self._buffer.shape[0]} were expected at most")
        return self._buffer[:num_rows]


class MoeSumRecorder:
    """Measures the rows that a kernel is about to add.

    Args:
        layer: The layer.
        sums: Where to add.
        slots: Labels of the current step's rows.
    """

    moment: ClassVar[Moment] = Moment.AT_SUM

    def __init__(self, layer: LayerFacts, sums: LayerSums, slots: PersistentSlots) -> None:
        self._layer = layer
        self._sums = sums
        self._slots = slots
        self._gate_TK: torch.Tensor | None = None
        self._ids_TK: torch.Tensor | None = None

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Keeps the gates and ids of the call for the reduction that follows; some kernels do not pass them on."""
        self._gate_TK, self._ids_TK = gate_TK, expert_ids_TK

    def rows_written(self, rows_TKH: torch.Tensor) -> None:
        """Measures the weighted rows of the call.

        Slots of other ranks' experts hold what was in memory before; `torch.where` drops them, since a product with
        zero would keep a NaN.

        Raises:
            ValueError: The rows are not those of the call that was observed.
        """
        gate_TK, ids_TK = self._gate_TK, self._ids_TK
        self._gate_TK = self._ids_TK = None
        if gate_TK is None or ids_TK is None or rows_TKH.shape[:2] != ids_TK.shape:
            expected = None if ids_TK is None else tuple(ids_TK.shape)
            raise ValueError(f"the kernel wrote rows of shape {tuple(rows_TKH.shape)} for slots of shape {expected}")
        here_TK = local_ids(self._layer, ids_TK) >= 0
        rows_TKH = torch.where(here_TK.unsqueeze(-1), rows_TKH, 0)
        measured = measure_rows(self._layer, rows_TKH, gate_TK, weighted=True)
        ids_TK, measured = counted(self._layer, ids_TK, measured)
        self._sums.add(self._slots.all_slots(rows_TKH.shape[0]), ids_TK, measured)

    def flush(self) -> None:
        """Nothing is held back."""
