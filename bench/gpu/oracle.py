"""What a recorder should have summed, from the inputs and routing of every layer call, in plain PyTorch.

A spy stands in front of each layer's tap. While a graph is captured it copies the whole call into buffers of its own,
so that a replay fills them; after each step they are read. It knows nothing of the recorders' sampling or gathering.

Axes: T tokens, K experts per token, H hidden, E experts, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

COLUMNS = ("token_count", "gate_sum", "norm_sum", "weighted_norm_sum")


class Spy:
    """Stands in front of one layer's tap."""

    def __init__(self, tap: Any, max_rows: int, hidden: int, top_k: int, device: torch.device) -> None:
        self._tap = tap
        self.x = torch.zeros(max_rows, hidden, dtype=torch.bfloat16, device=device)
        self.gate = torch.zeros(max_rows, top_k, dtype=torch.float32, device=device)
        self.ids = torch.zeros(max_rows, top_k, dtype=torch.int32, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tap, name)

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor | None:
        rows = x_TH.shape[0]
        for room, values in ((self.x, x_TH), (self.gate, gate_TK), (self.ids, ids_TK)):
            room[:rows].copy_(values)
        output: torch.Tensor | None = self._tap.record(x_TH, gate_TK, ids_TK)
        return output


class Oracle:
    """Sums of all layers, from what the spies saw.

    Args:
        weights: Of each layer's experts, float32.
        num_experts: Of each layer.
    """

    def __init__(self, weights: list[dict[str, torch.Tensor]], num_experts: int) -> None:
        self._weights = weights
        self.sums_LEC = np.zeros((len(weights), num_experts, len(COLUMNS)))
        self.spies: list[Spy] = []
        self.rows = 0

    def watch(self, device: torch.device, layers: list[Any], max_rows: int) -> None:
        """Puts the spies in place; nothing was captured yet."""
        for layer in layers:
            config = layer.moe_config
            spy = Spy(
                layer.routed_experts.reap_tap,
                max_rows,
                config.hidden_dim,
                config.experts_per_token,
                device,
            )
            layer.routed_experts.reap_tap = spy
            self.spies.append(spy)

    def follow(self, hooks: Any) -> None:
        """Reads the spies after each step of an engine."""
        rows_ordered, step_ends = hooks.rows_ordered, hooks.step_ends

        def counted(batch: Any) -> None:
            self.rows = sum(batch.num_scheduled)
            rows_ordered(batch)

        def read() -> None:
            step_ends()
            self._add()
            self.rows = 0

        hooks.rows_ordered, hooks.step_ends = counted, read

    def _add(self) -> None:
        if self.rows == 0:
            return
        for layer, spy in enumerate(self.spies):
            x_TH, gate_TK, ids_TK = (each[: self.rows].cpu() for each in (spy.x, spy.gate, spy.ids))
            self._add_rows(layer, x_TH.float(), gate_TK, ids_TK.long())

    def _add_rows(self, layer: int, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor) -> None:
        self.sums_LEC[layer] += sums_of(x_TH, gate_TK, ids_TK, self._weights[layer])


class DroppedMass(Oracle):
    """The share of its gate mass that a full router would give to dropped experts.

    Args:
        routers_LEH: The routers before pruning, float32.
        kept: Experts that pruning kept, in every layer.
        top_k: Experts that a token has; their weights are made to add up to 1.
    """

    def __init__(self, routers_LEH: torch.Tensor, kept: list[int], top_k: int) -> None:
        super().__init__([], 0)
        self._routers_LEH = routers_LEH
        self._dropped_E = torch.ones(routers_LEH.shape[1], dtype=torch.bool)
        self._dropped_E[kept] = False
        self._top_k = top_k
        self.tokens = 0
        self.dropped_L = np.zeros(routers_LEH.shape[0])

    @property
    def fraction(self) -> float:
        """The mean over the layers."""
        return float(self.dropped_L.mean() / self.tokens)

    def _add_rows(self, layer: int, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor) -> None:
        probability_TE = torch.softmax(x_TH @ self._routers_LEH[layer].T, dim=-1)
        top_TK, chosen_TK = torch.topk(probability_TE, self._top_k)
        share_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
        self.dropped_L[layer] += float(share_TK[self._dropped_E[chosen_TK]].sum())
        self.tokens += x_TH.shape[0] * (layer == 0)


def sums_of(
    x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor, weights: dict[str, torch.Tensor]
) -> npt.NDArray[np.float64]:
    """The columns of one layer's experts [E, C]."""
    sums_EC = np.zeros((weights["down"].shape[0], len(COLUMNS)))
    for expert in range(sums_EC.shape[0]):
        token_N, position_N = torch.where(ids_TK == expert)
        gate_NI, up_NI = (x_TH[token_N] @ weights["gate_up"][expert].T).chunk(2, dim=-1)
        output_NH = (torch.nn.functional.silu(gate_NI) * up_NI) @ weights["down"][expert].T
        norm_N, gate_N = output_NH.double().norm(dim=-1), gate_TK[token_N, position_N].double()
        columns = (torch.ones_like(gate_N), gate_N, norm_N, norm_N * gate_N)
        sums_EC[expert] = torch.stack(columns).sum(dim=1).numpy()
    return sums_EC


@contextlib.contextmanager
def watched(oracle: Oracle) -> Iterator[None]:
    """Lets an oracle watch the engine that is started in this context."""
    from reap_serve.adapter.loaded import LoadedEngine

    plain = LoadedEngine.connect

    def connect(self: Any, recorder: Any) -> None:
        plain(self, recorder)
        oracle.watch(self.device, self._layers, self.max_rows)

    LoadedEngine.connect = connect  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoadedEngine.connect = plain  # type: ignore[method-assign]


def snapshot(llm: Any) -> tuple[np.ndarray, Any]:
    """What an engine has recorded: the columns of all layers' experts [L, E, C], and the window."""
    from reap_serve.record.snapshot import RankSums

    taken = RankSums.from_bytes(llm.collective_rpc("reap_snapshot")[0])
    # Columns of the file: token_count, gate_sum, norm_sum, norm_sq_sum, weighted_norm_sum, weighted_norm_sq_sum.
    return taken.sums_SPLEC.sum(axis=(0, 1))[..., [0, 1, 2, 4]], taken.window
