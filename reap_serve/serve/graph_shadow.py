"""The shadow router where steps are replayed from CUDA graphs, in which no Python runs.

Captured with each layer is a gather of fixed shape: what its router was given and what it made of it, of the rows at a
persistent index, goes to persistent places where rows are held. Before a step that is measured the host writes both;
after it the places are trash again. What is held is given to the full router outside of graphs, when the places are
full or somebody asks. A step of more tokens than any graph has runs in Python, and is measured there.

So a graph holds no full router: two gathers a layer of at most 64 rows. The full router's E H multiplications a row
are spent on measured rows alone. Memory of L layers and C = 128 places: L (C + 1) (H in the router's dtype + D in
float32), so 61 layers of 7,168 in bfloat16 with 128 kept experts take 117 MB.

Not yet run on a GPU; tests/unit/serve/test_graph_shadow.py captures and replays on a CPU what a graph would.

Axes: T tokens, N landing rows, C places, H hidden, D kept experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from reap_serve.adapter.routing import RoutedLayer, RoutingHook
from reap_serve.record.captured_rows import LANDING_ROWS, Graphs
from reap_serve.record.requests import Requests
from reap_serve.record.sampling import RowSample, RowSampler, to_device
from reap_serve.record.step import Step
from reap_serve.serve.shadow import EngineShadow, ShadowRouter
from reap_serve.serve.sidecar import FullRouter

PLACES = 128


class GraphLayerShadow:
    """One layer's rows, as a graph gathers them.

    Args:
        shadow: Of the engine.
        position: Of the layer in this process.
        router: The full router.
        device: Where the layer computes.
    """

    def __init__(self, shadow: GraphShadow, position: int, router: ShadowRouter, device: torch.device) -> None:
        self._shadow = shadow
        self._position = position
        self._router = router
        # The last place is trash.
        self._x_CH = torch.zeros(PLACES + 1, router.hidden, dtype=router.dtype, device=device)
        self._logits_CD = torch.zeros(PLACES + 1, router.num_kept, dtype=torch.float32, device=device)
        self._logits_dtype, self._ids_dtype = torch.float32, torch.int32
        self._loaded = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the places."""
        return self._x_CH.nbytes + self._logits_CD.nbytes

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor
    ) -> None:
        """See `routing.RoutingHook`; writes nothing that is served."""
        shadow = self._shadow
        if shadow.refusal is not None:
            return
        with shadow.guarded():
            if shadow.in_python is not None:
                sample = shadow.in_python
                found = self._router.choose(x_TH[sample.rows], logits_TE[sample.rows], expert_ids_TK.dtype)
                shadow.gate_mass.add(self._position, sample.slots, *found)
            elif shadow.gathers or not self._loaded:
                self._gather(x_TH, logits_TE)
                self._logits_dtype, self._ids_dtype = logits_TE.dtype, expert_ids_TK.dtype
                if not self._loaded and not shadow.capturing:
                    # A router that is compiled at its first call would keep requests waiting for it.
                    self._router.load(self._x_CH, self._logits_dtype, self._ids_dtype)
                self._loaded = True

    def _gather(self, x_TH: torch.Tensor, logits_TD: torch.Tensor) -> None:
        index_N, place_N = self._shadow.rows(x_TH.shape[0])
        for room_CX, values_TX in ((self._x_CH, x_TH), (self._logits_CD, logits_TD)):
            room_CX.index_copy_(0, place_N, values_TX.index_select(0, index_N).to(room_CX.dtype))

    def measure(self, slot_C: torch.Tensor) -> None:
        """Gives the held rows to the full router.

        Args:
            slot_C: Of the rows in the first places.
        """
        held = slice(0, slot_C.shape[0])
        logits_CD = self._logits_CD[held].to(self._logits_dtype)
        found = self._router.choose(self._x_CH[held], logits_CD, self._ids_dtype)
        self._shadow.gate_mass.add(self._position, slot_C, *found)


class GraphShadow(EngineShadow):
    """The shadow routers of one engine process whose steps are replayed.

    Each token is measured with the same probability, at most `LANDING_ROWS` over the rows of the largest graph, so that
    no graph has to gather more rows than land.

    Args:
        layers: The fused MoE layers of this process; nothing was captured yet.
        full: The routers before pruning.
        device: Where the layers compute.
        requests: The engine's requests.
        fraction: Share of the tokens that are measured.
        graphs: Of the engine.

    Attributes:
        in_python: The sample of a step that is too large for any graph, None in others.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        full: Mapping[int, FullRouter],
        device: torch.device,
        requests: Requests,
        fraction: float,
        graphs: Graphs,
    ) -> None:
        landing = min(LANDING_ROWS, graphs.largest)
        self.in_python: RowSample | None = None
        self._graphs = graphs
        self._sampler = RowSampler(min(fraction, landing / graphs.largest), requests.trash_slot, device)
        self._index_N = torch.zeros(landing, dtype=torch.int64, device=device)
        self._place_N = torch.full((landing,), PLACES, dtype=torch.int64, device=device)
        self._slot_C = torch.full((PLACES,), requests.trash_slot, dtype=torch.int64, device=device)
        self._held = self._landing = 0
        self._layers: list[GraphLayerShadow] = []
        super().__init__(layers, full, device, requests, fraction)

    def _hook(self, position: int, router: ShadowRouter) -> RoutingHook:
        self._layers.append(GraphLayerShadow(self, position, router, self._device))
        return self._layers[-1]

    @property
    def held_bytes(self) -> int:
        """Memory of the places of all layers."""
        return sum(layer.num_bytes for layer in self._layers)

    @property
    def capturing(self) -> bool:
        """Whether a graph is being captured now."""
        return self._graphs.capturing()

    @property
    def gathers(self) -> bool:
        """Whether layers gather rows now: for the step, or for the replays of a graph."""
        return self._landing > 0 or self.capturing

    def rows(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows of a layer call go where: views, valid for every later replay."""
        landing = min(num_rows, self._index_N.shape[0])
        return self._index_N[:landing], self._place_N[:landing]

    def begin(self, step: Step) -> None:
        """Notes the sampled rows of the step that begins."""
        if self.refusal is not None:
            return
        self._sampler.begin(step.certain_slots(self._trash_slot))
        sample = self._sampler.sample
        if sample is None:
            return
        num_rows, landing = sample.rows.shape[0], self._index_N.shape[0]
        if num_rows > landing:
            self.in_python = sample
            return
        if self._held + num_rows > PLACES:
            self.settle()
        index_N, place_N = np.zeros(landing, np.int64), np.full(landing, PLACES, np.int64)
        index_N[:num_rows] = sample.host_rows
        place_N[:num_rows] = np.arange(self._held, self._held + num_rows)
        with torch.inference_mode():
            self._index_N.copy_(to_device(index_N, self._device), non_blocking=True)
            self._place_N.copy_(to_device(place_N, self._device), non_blocking=True)
            self._slot_C[self._held : self._held + num_rows].copy_(sample.slots)
        self._landing = num_rows

    def end(self) -> None:
        """What was gathered is held; a replay until the next step writes to trash."""
        self._held += self._landing
        self.discard()

    def discard(self) -> None:
        """The step failed: what was gathered is not held."""
        self.in_python = None
        self._sampler.end()
        if self._landing:
            with torch.inference_mode():
                self._index_N.zero_()
                self._place_N.fill_(PLACES)
            self._landing = 0

    def settle(self) -> None:
        """Measures the rows that are held."""
        held, self._held = self._held, 0
        if held and self.refusal is None:
            with torch.inference_mode(), self.guarded():
                for layer in self._layers:
                    layer.measure(self._slot_C[:held])

    def reset(self) -> None:
        """Forgets what was measured and what is held."""
        self._held = 0
        super().reset()
