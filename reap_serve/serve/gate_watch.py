"""Gate weights of single requests, for trials of masks: what the full router gave to whom, token by token.

They stay in memory and leave the worker only to the process that tries plans; nothing of them is written.

Axes: T tokens, L layers, K experts per token.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.record.requests import PROMPT_ARGUMENT
from reap_serve.record.step import BatchRows, NewRequest

# A request with this argument, a number that no other one has, is watched from the row on that predicts its answer.
WATCH_ARGUMENT = "reap_watch"


@dataclass(frozen=True, slots=True)
class WatchedGates:
    """The router's choices for the rows of one request that predict its answer, in their order.

    Attributes:
        gates_TLK: Gate weights.
        experts_TLK: Expert ids.
    """

    gates_TLK: npt.NDArray[np.float32]
    experts_TLK: npt.NDArray[np.int32]


class GateWatch:
    """Collects the choices of watched requests.

    Args:
        num_layers: L, the layers of this process.
        device: Where they compute.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._device = device
        self._keys: dict[str, tuple[int, int]] = {}
        self._rows: torch.Tensor | None = None
        self._place_T2: list[npt.NDArray[np.int64]] = []
        self._parts_L: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(num_layers)]

    @property
    def in_use(self) -> bool:
        """Whether a watched request is under way."""
        return bool(self._keys)

    def admit(self, request: NewRequest) -> None:
        """A request enters."""
        arguments = request.arguments or {}
        key, prompt_tokens = arguments.get(WATCH_ARGUMENT), arguments.get(PROMPT_ARGUMENT)
        if isinstance(key, int) and isinstance(prompt_tokens, int):
            self._keys[request.id] = key, max(prompt_tokens - 1, 0)

    def finish(self, request_ids: Iterable[str]) -> None:
        """Requests left the engine."""
        for request_id in request_ids:
            self._keys.pop(request_id, None)

    def begin(self, batch: BatchRows) -> None:
        """Notes the watched rows of the step that begins."""
        rows, places = [], []
        start = 0
        for request_id, scheduled, computed in zip(
            batch.request_ids, batch.num_scheduled, batch.num_computed, strict=True
        ):
            known = self._keys.get(request_id)
            if known is not None and computed + scheduled > known[1]:
                positions = np.arange(max(known[1], computed), computed + scheduled)
                rows.append(start + positions - computed)
                places.append(np.stack((np.full(len(positions), known[0]), positions), axis=1))
            start += scheduled
        if rows:
            self._rows = torch.from_numpy(np.concatenate(rows)).to(self._device)
            self._place_T2.append(np.concatenate(places))

    def end(self) -> None:
        """What runs until the next step is nobody's."""
        self._rows = None

    def see(self, layer: int, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        """Sees the full router's choice in one layer, before masks change it."""
        if self._rows is not None:
            self._parts_L[layer].append((weights_TK[self._rows].float(), expert_ids_TK[self._rows].int()))

    def take(self) -> bytes:
        """Everything since the last call: `read_gates` reads it."""
        content = io.BytesIO()
        if self._place_T2:
            gates_LTK = [torch.cat([part[0] for part in parts]).cpu().numpy() for parts in self._parts_L]
            experts_LTK = [torch.cat([part[1] for part in parts]).cpu().numpy() for parts in self._parts_L]
            np.savez(
                content,
                places=np.concatenate(self._place_T2),
                gates=np.stack(gates_LTK, axis=1),
                experts=np.stack(experts_LTK, axis=1),
            )
        self._place_T2 = []
        self._parts_L = [[] for _ in self._parts_L]
        return content.getvalue()


def read_gates(content: bytes) -> dict[int, WatchedGates]:
    """The choices by the requests' numbers; a row that was computed twice, after a preemption, counts once."""
    if not content:
        return {}
    with np.load(io.BytesIO(content)) as arrays:
        places_T2, gates_TLK, experts_TLK = arrays["places"], arrays["gates"], arrays["experts"]
    found = {}
    for key in np.unique(places_T2[:, 0]).tolist():
        rows = np.flatnonzero(places_T2[:, 0] == key)
        _, first = np.unique(places_T2[rows, 1], return_index=True)
        found[key] = WatchedGates(gates_TLK[rows[first]], experts_TLK[rows[first]])
    return found
