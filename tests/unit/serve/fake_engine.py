"""An engine whose workers are one `LiveEngine`, reached through the worker extension by RPC as vLLM does it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from routing_cases import CASES, E, layer_with

from reap_serve.adapter.routing import RoutedLayer, add_routing_hook
from reap_serve.adapter.worker import ReapWorkerExtension
from reap_serve.model import Fingerprint
from reap_serve.record.accumulate import MAX_COLUMNS, SUM_COLUMNS
from reap_serve.record.requests import Requests
from reap_serve.record.snapshot import RankSums
from reap_serve.serve.graph_mask import GraphMasks
from reap_serve.serve.live import LiveEngine, RankFacts
from reap_serve.serve.mask import EngineMasks
from reap_serve.serve.windows import LiveSetup
from reap_serve.statistics.record import Layer, Window

MODEL = Fingerprint(
    architecture="qwen3_moe",
    num_layers=1,
    num_experts=E,
    top_k=3,
    dtype="float32",
    quantization=None,
    config_sha256="c" * 64,
    weights_sha256="w" * 64,
)


@dataclass
class FixedMeter:
    """Takes no time."""

    seconds: float

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


class FakeObserver:
    """Counts instead of measuring: `record` adds tokens, each to expert 0, 1 and 2."""

    def __init__(self) -> None:
        self.recorders = "deferred"
        self.settings, self.held_bytes = SimpleNamespace(overhead_budget=0.02), 0
        self.recording, self.complete, self.failures = True, True, 0
        self.busy, self.own = FixedMeter(10.0), FixedMeter(0.5)
        self.sample_fraction, self.layer_indices = 1.0, (0,)
        self.tokens_in_window = self.tokens_recorded = self.windows = 0
        self.broken = False
        self.unsettled = 0

    def record(self, tokens: int) -> None:
        self.tokens_in_window += tokens
        self.tokens_recorded += tokens

    def expert_counts(self) -> np.ndarray:
        counts_LE = np.zeros((1, E), np.int64)
        counts_LE[0, :3] = self.tokens_in_window
        return counts_LE

    def tokens_by_slice(self) -> dict[str, int]:
        return {"default": self.tokens_in_window} if self.tokens_in_window else {}

    def snapshot(self) -> RankSums:
        if self.broken:
            raise RuntimeError("torn")
        self.windows += 1
        window = Window(
            id=f"window {self.windows}",
            started="2026-01-01T00:00:00.000+00:00",
            ended="2026-01-01T00:01:00.000+00:00",
            recorder="deferred",
            requests=1,
            prompt_tokens_total=self.tokens_in_window,
            prompt_tokens_computed=self.tokens_in_window,
            sample_fraction=1.0,
            complete=self.complete,
        )
        sums = np.zeros((1, 2, 1, E, len(SUM_COLUMNS)))
        sums[0, 0, 0, :3] = self.tokens_in_window
        tokens = np.array([[[self.tokens_in_window], [0]]], np.int64)
        layers = (Layer(index=0, name="model.layers.0.mlp.experts"),)
        maxima = np.ones((1, 2, 1, E, len(MAX_COLUMNS)), np.float32)
        return RankSums(window, layers, ("default",), sums, maxima, tokens)

    def reset(self) -> None:
        self.next_window()

    def next_window(self) -> None:
        self.tokens_in_window, self.complete = 0, True

    def settle(self) -> bool:
        """As of a rank that measures together with others: at the second call, unless it can at once."""
        self.unsettled -= self.unsettled > 0
        return self.unsettled == 0

    def lose_held(self) -> None:
        self.complete &= self.unsettled == 0

    def step_failed(self) -> None:
        self.complete = False

    def end(self) -> None:
        """Nothing was begun."""

    def start(self) -> None:
        self.recording = True

    def stop(self) -> None:
        self.recording = False


def live_engine(
    setup: LiveSetup | None = None,
    observer: FakeObserver | None = None,
    mask_refusal: str | None = None,
    places: int | None = None,
) -> LiveEngine:
    """A rank with one layer of E experts; with graphs where there are places in them."""
    layer = layer_with(CASES[0].make(E, torch.zeros(E)))
    add_routing_hook(layer, traced=False)
    requests = Requests(max_slices=4)
    common = [RoutedLayer(layer)], torch.device("cpu"), requests, 1.0
    masks = EngineMasks(*common) if places is None else GraphMasks(*common, 8, places)
    facts = RankFacts(mask_refusal=mask_refusal, shadow_refusal=None, weights_bytes=1000)
    return LiveEngine(requests, observer or FakeObserver(), masks, None, setup, facts)  # type: ignore[arg-type]


class FakeEngine:
    """vLLM's client: every argument and result crosses as JSON."""

    def __init__(self, live: LiveEngine) -> None:
        self.live = live
        self.calls: list[str] = []
        self._worker: Any = ReapWorkerExtension()
        self._worker.model_runner = SimpleNamespace(reap_live=live)

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[object, ...] = (), kwargs: None = None
    ) -> Sequence[object]:
        self.calls.append(method)
        result = getattr(self._worker, method)(*json.loads(json.dumps(args)))
        return [json.loads(json.dumps(result))]
