"""A model of two layers whose passes are captured, with what its runner feeds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fake_layer import FakeExperts
from graph_replay import capturing

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.captured import CapturedRecorder
from reap_serve.record.recorder import RowShape

CPU = torch.device("cpu")
TRASH, EXPERTS, TOP_K, HIDDEN, LAYERS = 4, 4, 2, 3, 2
SIZES = (4, 8, 16)
SHAPE = RowShape(HIDDEN, TOP_K, torch.float32)


@dataclass
class Inputs:
    """Persistent inputs of the captured passes, as a model runner has them."""

    x_TH: torch.Tensor
    gate_LTK: torch.Tensor
    ids_LTK: torch.Tensor

    @classmethod
    def empty(cls) -> Inputs:
        size = SIZES[-1]
        return cls(
            torch.full((size, HIDDEN), torch.nan),
            torch.full((LAYERS, size, TOP_K), torch.nan),
            torch.zeros(LAYERS, size, TOP_K, dtype=torch.int32),
        )

    def fill(self, random: torch.Generator, rows: int) -> None:
        """New contents; the rows behind are padding, of which nothing may be read."""
        self.x_TH.fill_(torch.nan)
        self.gate_LTK.fill_(torch.nan)
        self.x_TH[:rows] = torch.randint(-8, 8, (rows, HIDDEN), generator=random).float()
        self.gate_LTK[:, :rows] = torch.rand(LAYERS, rows, TOP_K, generator=random)
        ids = torch.rand(LAYERS, rows, EXPERTS, generator=random).argsort(dim=-1)[..., :TOP_K]
        self.ids_LTK[:, :rows] = ids.int()


def model(inputs: Inputs, recorders: list[Any], size: int) -> torch.Tensor:
    """A pass of `size` rows: each layer adds the output of its experts."""
    x_TH = inputs.x_TH[:size]
    for layer, recorder in enumerate(recorders):
        gate_TK, ids_TK = inputs.gate_LTK[layer, :size], inputs.ids_LTK[layer, :size]
        # As `record.tap` does: under capture a graph gets the gather.
        see = recorder.gather if capturing() and isinstance(recorder, CapturedRecorder) else recorder.record
        see(x_TH, gate_TK, ids_TK)
        x_TH = x_TH + FakeExperts().forward(x_TH, gate_TK, ids_TK)
    return x_TH


def sums_of_layers() -> list[LayerSums]:
    return [LayerSums(TRASH, EXPERTS, CPU) for _ in range(LAYERS)]
