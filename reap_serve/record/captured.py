"""The `deferred` recorder where steps are replayed from CUDA graphs, in which no Python runs.

Captured with each layer is a gather of fixed shape: the rows of its input, gate weights and expert ids at a persistent
index go to a persistent landing buffer. Before a step the host writes the sampled rows into the index; after it, what
landed is copied for all layers at once, and measured when the buffer is full, by the same kernel with one row a routed
slot, outside of graphs. A step that is not sampled gathers what nobody reads. The served computation reads none of it.

A step of more tokens than any graph has runs in Python: there each layer's rows are copied, or measured, as they are.

Memory of L layers of hidden size H in two bytes, top-k K, N landing rows and C held rows: L (N + C) (2 H + 8 K) bytes;
61 layers of 7,168, K = 8, N = 64 and C = 256 take 281 MB.

Not yet run on a GPU; tests/unit/record/graph_replay.py captures and replays on a CPU what a graph would.

Axes: L layers, N landing rows, C held rows, T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.expand import expert_rows, local_ids, measure_rows
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.sampling import RowSampler

# Sampled rows of a step that a graph replays. The fraction is bounded so that more are never drawn.
LANDING_ROWS = 64
# Of rows that all layers together hold until they are measured.
HELD_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a layer's routed tokens look like.

    Attributes:
        hidden: Width of the experts' input.
        top_k: Experts per token.
        dtype: Of the input.
    """

    hidden: int
    top_k: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of one layer: input, gate weights in float32, ids in int32."""
        return self.hidden * self.dtype.itemsize + 8 * self.top_k


class _Rows:
    """Room for rows of every layer."""

    def __init__(self, num_layers: int, num_rows: int, shape: RowShape, device: torch.device) -> None:
        self.x_LRH = torch.zeros(num_layers, num_rows, shape.hidden, dtype=shape.dtype, device=device)
        self.gate_LRK = torch.zeros(num_layers, num_rows, shape.top_k, dtype=torch.float32, device=device)
        self.ids_LRK = torch.zeros(num_layers, num_rows, shape.top_k, dtype=torch.int32, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x_LRH, self.gate_LRK, self.ids_LRK


class CapturedRows:
    """Sampled rows of all layers of one engine process.

    Args:
        num_layers: Layers.
        shape: Of their rows, the same in all of them.
        device: Where they are.
        landing_rows: Rows that a graph gathers at most.
        held_rows: Rows held until they are measured; no fewer than `landing_rows`.
        capturing: Whether a graph is being captured now.

    Attributes:
        held: Rows that wait to be measured.
        recorders: Of the layers.
    """

    def __init__(
        self,
        num_layers: int,
        shape: RowShape,
        device: torch.device,
        landing_rows: int,
        held_rows: int,
        capturing: Callable[[], bool],
    ) -> None:
        if held_rows < landing_rows:
            raise ValueError(f"{held_rows} held rows do not take {landing_rows} landing rows")
        self.capturing = capturing
        self.landing_rows = landing_rows
        self.held_rows = held_rows
        self.held = 0
        self._device = device
        self._index_N = torch.zeros(landing_rows, dtype=torch.int64, device=device)
        self._landing = _Rows(num_layers, landing_rows, shape, device)
        self._store = _Rows(num_layers, held_rows, shape, device)
        self._slots = torch.zeros(held_rows, dtype=torch.int64, device=device)
        self._measured = [0] * num_layers
        self._step_slots: torch.Tensor | None = None
        self._seen_in_python = 0
        self._num_layers = num_layers
        self.recorders: list[CapturedRecorder] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        tensors = (*self._landing.tensors, *self._store.tensors, self._slots, self._index_N)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def gather(self, layer: int, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor) -> None:
        """What a graph captures: the indexed rows of one layer, to where they land.

        Raises:
            ValueError: The rows are not of the shape that there is room for.
        """
        num_rows = min(self.landing_rows, x_TH.shape[0])
        index_N = self._index_N[:num_rows]
        for room_LNC, values_TC in zip(self._landing.tensors, (x_TH, gate_TK, ids_TK), strict=True):
            landed_NC = room_LNC[layer, :num_rows]
            if values_TC.shape[1:] != landed_NC.shape[1:]:
                raise ValueError(
                    f"layer {layer} has rows of {tuple(values_TC.shape[1:])}, there is room for "
                    f"{tuple(landed_NC.shape[1:])}"
                )
            if values_TC.dtype == landed_NC.dtype:
                torch.index_select(values_TC, 0, index_N, out=landed_NC)
            else:
                landed_NC.copy_(values_TC.index_select(0, index_N))

    def begin(self, rows: npt.NDArray[np.int64], slots: torch.Tensor) -> None:
        """A sampled step begins; measures what is held where its rows do not fit beside it.

        Args:
            rows: Indices of the sampled rows.
            slots: Their slots, on the device.
        """
        num_rows = rows.shape[0]
        if num_rows <= self.held_rows < self.held + num_rows:
            for recorder in self.recorders:
                recorder.flush()
        self._step_slots, self._seen_in_python = slots, 0
        if num_rows <= self.landing_rows:
            index_N = np.zeros(self.landing_rows, np.int64)
            index_N[:num_rows] = rows
            self._index_N.copy_(to_device(index_N, self._device), non_blocking=True)

    def takes(self, num_rows: int) -> bool:
        """Whether the sampled rows of a step that runs in Python are held, so many as there are; counts the layer."""
        self._seen_in_python += 1
        return num_rows <= self.held_rows

    def hold(self, layer: int, x_NH: torch.Tensor, gate_NK: torch.Tensor, ids_NK: torch.Tensor) -> None:
        """Holds the sampled rows of one layer in a step that runs in Python."""
        part = slice(self.held, self.held + x_NH.shape[0])
        for room_LRC, values_NC in zip(self._store.tensors, (x_NH, gate_NK, ids_NK), strict=True):
            room_LRC[layer, part] = values_NC

    def end(self) -> None:
        """The step is over: what landed, or what was held in Python, counts.

        Raises:
            RuntimeError: Python saw some layers of the step and not the others, or more rows than can land.
        """
        slots, self._step_slots = self._step_slots, None
        if slots is None:
            return
        num_rows = slots.shape[0]
        if self._seen_in_python not in (0, self._num_layers):
            raise RuntimeError(f"{self._seen_in_python} of {self._num_layers} layers of a step ran in Python")
        if self._seen_in_python == 0:
            if num_rows > self.landing_rows:
                raise RuntimeError(f"a graph was replayed with {num_rows} sampled rows, {self.landing_rows} land")
            part = slice(self.held, self.held + num_rows)
            for room_LRC, landed_LNC in zip(self._store.tensors, self._landing.tensors, strict=True):
                room_LRC[:, part] = landed_LNC[:, :num_rows]
        # A step that is not sampled gathers, too, and may have fewer rows than this one.
        self._index_N.zero_()
        if num_rows <= self.held_rows:
            self._slots[self.held : self.held + num_rows] = slots
            self.held += num_rows

    def discard(self) -> None:
        """The step failed: nothing of it counts."""
        self._step_slots = None
        self._index_N.zero_()

    def unmeasured(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Input, gate weights, ids and slots of the rows that one layer holds, once; None when there are none."""
        rows = slice(self._measured[layer], self.held)
        if rows.start == rows.stop:
            return None
        x_LRH, gate_LRK, ids_LRK = self._store.tensors
        self._measured[layer] = self.held
        found = x_LRH[layer, rows], gate_LRK[layer, rows], ids_LRK[layer, rows], self._slots[rows]
        if min(self._measured) == self.held:
            # The kernels that read these rows are in the stream before what writes the next ones.
            self.held, self._measured = 0, [0] * self._num_layers
        return found


class CapturedRecorder:
    """One layer's recorder.

    Args:
        layer: Its position among the layers of the process.
        rows: Of all layers.
        sampler: Labels and sample of the current step's rows.
        measure: Adds rows to the sums.
    """

    def __init__(self, layer: int, rows: CapturedRows, sampler: RowSampler, measure: Measure) -> None:
        self._position = layer
        self._rows = rows
        self._sampler = sampler
        self._measure = measure
        rows.recorders.append(self)

    def observe(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Captures the gather, or takes the sampled rows of a step that runs in Python; the layer computes its own."""
        if self._rows.capturing():
            self._rows.gather(self._position, x_TH, gate_TK, expert_ids_TK)
            return
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


def held_rows(wanted: int, num_layers: int, shape: RowShape) -> int:
    """Rows to hold: as many as wanted, at most HELD_BYTES over all layers, no fewer than land."""
    return max(LANDING_ROWS, min(wanted, HELD_BYTES // (num_layers * shape.row_bytes)))


def to_device(values: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for: from page-locked memory, unless the device is a CPU."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Measure:
    """Measures held rows of one layer by its own kernel, with one row a routed slot.

    vLLM locks the kernels' workspace at the size that the largest step took. A call of no more rows than that step had
    tokens fits, whatever a kernel's workspace depends on; more rows are measured in several calls.

    Args:
        layer: The layer.
        sums: Where to add.
        extra: Where to add the optional sums, None without them.
        call_rows: Rows of one call of the kernel at most.
    """

    def __init__(self, layer: LayerFacts, sums: LayerSums, extra: ExtraSums | None, call_rows: int) -> None:
        self._layer = layer
        self._sums = sums
        self._extra = extra
        self._call_tokens = max(1, call_rows // layer.top_k)

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
