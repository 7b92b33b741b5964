"""What one engine process has recorded since its window began: the sums of its layers.

Axes: L layers.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.requests import Requests
from reap_serve.record.snapshot import RankSums, layer_arrays
from reap_serve.record.verdicts import Verdicts
from reap_serve.statistics.record import PHASES, Layer, Window


class OpenWindow:
    """The window of one engine process; every window uses the same memory.

    Args:
        layers: The fused MoE layers of the process.
        requests: The engine's requests, which count what they bring by themselves.
        device: Where the sums are.
        extra_sums: Optional sums to keep.
        verdicts: Of an engine with draft tokens.

    Attributes:
        sums: Of each layer.
        extra: The optional ones of each layer, None without any.
        complete: Whether nothing of the window was lost.
    """

    def __init__(
        self,
        layers: Sequence[LayerFacts],
        requests: Requests,
        device: torch.device,
        extra_sums: Collection[str],
        verdicts: Verdicts | None,
    ) -> None:
        self._layers = tuple(Layer(index=layer.index, name=layer.name) for layer in layers)
        self._requests = requests
        num_slots = requests.trash_slot
        self.sums = [LayerSums(num_slots, layer.num_experts, device, verdicts) for layer in layers]
        self.extra = [
            ExtraSums(extra_sums, num_slots, layer.num_experts, device) if extra_sums else None for layer in layers
        ]
        self._begin()

    def settle(self) -> None:
        """Adds what waited for a verdict on draft tokens, which is there."""
        for sums in self.sums:
            sums.settle()

    def next(self) -> None:
        """Begins a new window with sums of nothing."""
        for sums in (*self.sums, *self.extra):
            if sums is not None:
                sums.reset()
        self._requests.reset()
        self._begin()

    def expert_counts(self) -> npt.NDArray[np.int64]:
        """Routed tokens by layer and expert."""
        return np.stack([sums.expert_counts() for sums in self.sums])

    def tokens_by_slice(self) -> dict[str, int]:
        """Recorded tokens by slice."""
        used = len(self._requests.slices) * len(PHASES)
        tokens_LS = np.stack([sums.tokens_S[:used].cpu().numpy() for sums in self.sums]).reshape(
            len(self.sums), -1, len(PHASES)
        )
        return dict(zip(self._requests.slices, tokens_LS.sum(axis=2).max(axis=0).tolist(), strict=True))

    def snapshot(self, recorder: str, sample_fraction: float) -> RankSums:
        """The sums so far, in the main memory.

        Args:
            recorder: Which recorders record, for people.
            sample_fraction: Recorded of the real tokens.
        """
        requests = self._requests
        arrays = [
            layer_arrays(sums, len(requests.slices), len(PHASES), extra)
            for sums, extra in zip(self.sums, self.extra, strict=True)
        ]
        window = Window(
            id=self._id,
            started=self._started,
            ended=_now(),
            recorder=recorder,
            requests=requests.requests,
            prompt_tokens_total=requests.prompt_tokens_total,
            prompt_tokens_computed=requests.prompt_tokens_computed,
            sample_fraction=sample_fraction,
            complete=self.complete,
        )
        return RankSums.stack(window, self._layers, tuple(requests.slices), arrays)

    def _begin(self) -> None:
        self._id = uuid.uuid4().hex
        self._started = _now()
        self.complete = True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
