"""Plans where steps are replayed from CUDA graphs: every plan is routed in every graph, and each row takes its own.

The plans are there when the graphs are captured: those that the server was started with. Which row is under which one
is a tensor that stays where it is and is written before the step; outside of steps no row is under any.

Not yet run on a GPU; tests/unit/serve/test_graph_mask.py captures and replays on a CPU what a graph would.

Axes: T tokens, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from reap_serve.adapter.routing import RoutedLayer
from reap_serve.record.requests import Requests
from reap_serve.record.sampling import to_device
from reap_serve.record.step import Step
from reap_serve.serve.mask import EngineMasks, LayerPlan

NO_PLAN = -1
REMEDY = "name them with --plan NAME=PLAN at the start, or start with --enforce-eager"


class GraphLayerMask:
    """The plans of one layer, as a graph holds them.

    Args:
        masks: Of the engine.
        position: Of the layer in this process.
        plans: The layer under each plan, in the order of the engine's plans.
    """

    def __init__(self, masks: GraphMasks, position: int, plans: Sequence[LayerPlan]) -> None:
        self._masks = masks
        self._position = position
        self._plans = plans

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor
    ) -> None:
        """See `routing.RoutingHook`; every operation has a fixed shape."""
        masks = self._masks
        plan_T, slot_T = masks.rows(x_TH.shape[0])
        full_weights_TK, full_ids_TK = weights_TK.clone(), expert_ids_TK.clone()
        for number, (plan, mass) in enumerate(zip(self._plans, masks.gate_mass.values(), strict=True)):
            mine_T = plan_T == number
            dropped_TK = plan.dropped_E[full_ids_TK.long()]
            mass.sum(self._position, torch.where(mine_T, slot_T, masks.trash_slot), full_weights_TK, dropped_TK)
            weights, ids = plan.route(x_TH, logits_TE, expert_ids_TK.dtype)
            mine_T1 = mine_T.unsqueeze(1)
            weights_TK.copy_(torch.where(mine_T1, weights.to(weights_TK.dtype), weights_TK))
            expert_ids_TK.copy_(torch.where(mine_T1, ids, expert_ids_TK))


class GraphMasks(EngineMasks):
    """The plans of one engine process whose steps are replayed.

    Args:
        layers: The fused MoE layers of this process; nothing was captured yet.
        device: Where they compute.
        requests: The engine's requests.
        drift_fraction: Share of the steps that measure the dropped gate mass.
        max_rows: Rows of the largest step, padding included.
        plans: Kept experts by index of the decoder layer, of each plan by its id.
        answer_only: Whether they route the answer's rows alone.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        device: torch.device,
        requests: Requests,
        drift_fraction: float,
        max_rows: int,
        plans: Mapping[str, Mapping[int, Sequence[int]]],
        *,
        answer_only: bool,
    ) -> None:
        super().__init__(layers, device, requests, drift_fraction)
        self.trash_slot = requests.trash_slot
        self._plan_T = torch.full((max_rows,), NO_PLAN, dtype=torch.int64, device=device)
        self._slot_T = torch.full((max_rows,), self.trash_slot, dtype=torch.int64, device=device)
        self._number = {plan: number for number, plan in enumerate(plans)}
        self._written = False
        for plan, kept in plans.items():
            self._reserve(plan, kept)
            if answer_only:
                self.answer_only.add(plan)
        for position, layer in enumerate(layers):
            found = [LayerPlan(layer.router, kept[layer.index], layer.num_experts, device) for kept in plans.values()]
            layer.set_routing_hook(GraphLayerMask(self, position, found))

    def rows(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Plan and slot of the rows of a layer call: views, valid for every later replay.

        Raises:
            ValueError: There are more rows than were expected.
        """
        if num_rows > self._plan_T.shape[0]:
            raise ValueError(f"a layer saw {num_rows} rows, {self._plan_T.shape[0]} were expected at most")
        return self._plan_T[:num_rows], self._slot_T[:num_rows]

    def load(self, plan: str, kept: Mapping[int, Sequence[int]], *, answer_only: bool = False) -> None:
        """Nothing is left to do for a plan of the start.

        Raises:
            ValueError: It is none: the graphs are captured.
        """
        if plan not in self._number:
            raise ValueError(f"CUDA graphs hold the plans that the server was started with; {REMEDY}")

    def release(self, plan: str) -> None:
        """A graph keeps its plans."""

    def unload_all(self) -> None:
        """A graph keeps its plans.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"CUDA graphs hold the plans that the server was started with; {REMEDY}")

    def begin(self, step: Step) -> None:
        """Notes the rows of the step that begins, by plan."""
        measured = bool(self._random.random() < self._drift_fraction)
        num_rows = step.slot_T.shape[0]
        plan_T = np.full(num_rows, NO_PLAN, np.int64)
        for plan, rows in step.plan_rows.items():
            plan_T[rows] = self._number[plan]
            if measured:
                self.gate_mass[plan].tokens += rows.shape[0]
        with torch.inference_mode():
            self._plan_T[:num_rows].copy_(to_device(plan_T, self._device), non_blocking=True)
            if measured:
                slot_T = step.certain_slots(self.trash_slot)
                self._slot_T[:num_rows].copy_(to_device(slot_T, self._device), non_blocking=True)
        self._written = True
        self._count(step)

    def end(self) -> None:
        """What runs until the next step is a dummy or warm-up run."""
        if self._written:
            with torch.inference_mode():
                self._plan_T.fill_(NO_PLAN)
                self._slot_T.fill_(self.trash_slot)
            self._written = False
        super().end()
