"""Room for the rows that captured graphs gather, and for those held after them until they are measured.

Memory of L layers of hidden size H in two bytes, top-k K, N landing rows and C held rows: L (N + C) (2 H + 8 K) bytes;
61 layers of 7,168, K = 8, N = 64 and C = 256 take 281 MB.

Axes: L layers, N landing rows, C held rows, R rows of a room, T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.errors import EngineError
from reap_serve.record.clock import StreamMeter
from reap_serve.record.recorder import RowShape
from reap_serve.record.sampling import to_device

# Sampled rows of a step that a graph replays. The fraction is bounded so that more are never drawn.
LANDING_ROWS = 64
TIMED_REPLAYS = 10
# Of rows that all layers together hold until they are measured.
HELD_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Graphs:
    """The graphs of an engine.

    Attributes:
        largest: Rows of the largest one, padding included.
        capturing: Whether one is being captured now.
    """

    largest: int
    capturing: Callable[[], bool]


class Flushes(Protocol):
    """One layer's recorder."""

    def flush(self) -> None:
        """Measures what the layer holds."""


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
    ) -> None:
        if held_rows < landing_rows:
            raise ValueError(f"{held_rows} held rows do not take {landing_rows} landing rows")
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
        self.recorders: list[Flushes] = []

    @property
    def on_cuda(self) -> bool:
        """Whether there are graphs in earnest."""
        return self._device.type == "cuda"

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        tensors = (*self._landing.tensors, *self._store.tensors, self._slots, self._index_N)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def gather_seconds(self) -> float:
        """What a replayed step spends on its gathers: of a graph that holds nothing else.

        Outside of a step: what is gathered here has as many rows as land, and an index beyond them stops a GPU.
        """
        if self._step_slots is not None:
            raise RuntimeError("a step has begun, whose rows are not those that are timed")
        x_LNH, gate_LNK, ids_LNK = (torch.zeros_like(room) for room in self._landing.tensors)
        graph, meter = torch.cuda.CUDAGraph(), StreamMeter()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for layer in range(self._num_layers):
                self.gather(layer, x_LNH[layer], gate_LNK[layer], ids_LNK[layer])
        graph.replay()
        meter.start()
        for _ in range(TIMED_REPLAYS):
            graph.replay()
        meter.stop()
        torch.cuda.synchronize()
        return meter.seconds / TIMED_REPLAYS

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


def held_rows(wanted: int, landing: int, num_layers: int, shape: RowShape) -> int:
    """Rows to hold: as many as wanted, at most HELD_BYTES over all layers, no fewer than land."""
    return max(landing, min(wanted, HELD_BYTES // (num_layers * shape.row_bytes)))


def room_for(
    graphs: Graphs,
    shapes: Sequence[RowShape | None],
    fraction: float,
    *,
    bounded: bool,
    held: int,
    device: torch.device,
) -> tuple[CapturedRows, float]:
    """Room for the rows that an engine's graphs gather.

    Args:
        graphs: Its graphs.
        shapes: Of the layers that gather.
        fraction: Largest probability with which a token is recorded.
        bounded: The fraction may be bounded for the sake of memory and time: an overhead budget chooses it.
        held: Rows to hold until they are measured.
        device: Where the layers compute.

    Returns:
        The room, and the largest fraction of which no step draws more rows than land.

    Raises:
        EngineError: The layers' rows differ in shape.
    """
    first = shapes[0]
    if first is None or any(shape != first for shape in shapes):
        raise EngineError("layers of different shapes cannot gather rows inside CUDA graphs", "add --enforce-eager")
    wanted = LANDING_ROWS if bounded else max(LANDING_ROWS, math.ceil(graphs.largest * fraction))
    landing = min(graphs.largest, wanted)
    rows = held_rows(held, landing, len(shapes), first)
    room = CapturedRows(len(shapes), first, device, landing, rows)
    return room, min(fraction, landing / graphs.largest)
