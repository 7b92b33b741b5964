"""Plans where steps are replayed from CUDA graphs: a graph has places, and what is written there is a plan.

A place holds, for each layer, which experts are dropped. Each row has a place, by an index that is written before the
step; outside of steps, and where a row is under no plan, it is one that drops nothing. So plans come and go between
steps, and no graph is captured anew.

A row's logits are -inf for the experts that its place drops. A router that adds a correction bias to its scores gets
-inf there, too: the bias alone could win against a score of 0. It adds one bias to all rows, so it is asked once for
each place; any other router is asked once for all of them. Groups of experts need nothing more: a group is scored by
its best members, and a plan keeps as many in each as the router needs.

The choice is that of the eager masks (`mask.LayerPlan`). Gate weights are equal to the bit for custom functions; others
may differ in the last one, since a softmax adds up E terms, of which those of dropped experts are 0, and not D.

Not yet run on a GPU; tests/unit/serve/test_graph_mask.py captures and replays on a CPU what a graph would.

Axes: P places, L layers, T tokens, H hidden, E experts, K experts per token; M slots of all places, one place after the
other; C columns of `GateMass`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from reap_serve.adapter.routing import RoutedLayer
from reap_serve.record.requests import Requests
from reap_serve.record.sampling import to_device
from reap_serve.record.step import NewRequest, Step
from reap_serve.serve.gate_mass import GateMass, add_mass
from reap_serve.serve.mask import EngineMasks
from reap_serve.shown_text import shown_logger

logger = shown_logger("reap_serve")


class NoPlaceError(ValueError):
    """Every place holds a plan that is in use."""


class GraphLayerMask:
    """The places of one layer.

    Args:
        masks: Of the engine.
        position: Of the layer in this process.
        layer: The layer.
        device: Where it computes.
    """

    def __init__(self, masks: GraphMasks, position: int, layer: RoutedLayer, device: torch.device) -> None:
        self._masks = masks
        self._position = position
        self._router = layer.router
        # Behind the places is one that drops nothing.
        self._dropped_PE = torch.zeros(masks.num_places + 1, layer.num_experts, dtype=torch.bool, device=device)
        bias_E = None if layer.router.is_custom else layer.router.correction_bias
        self._bias_PE = None if bias_E is None else bias_E.repeat(masks.num_places, 1)
        self._biased = [self._router.with_experts(layer.num_experts, row_E) for row_E in self._bias_rows()]

    def _bias_rows(self) -> Sequence[torch.Tensor]:
        return () if self._bias_PE is None else self._bias_PE.unbind()

    def write(self, place: int, kept: Sequence[int]) -> None:
        """Puts a plan in a place that no row is under."""
        dropped_E = np.ones(self._dropped_PE.shape[1], np.bool_)
        dropped_E[list(kept)] = False
        with torch.inference_mode():
            self._dropped_PE[place].copy_(torch.from_numpy(dropped_E))
            if self._bias_PE is not None:
                bias_E = self._router.correction_bias
                assert bias_E is not None
                self._bias_PE[place].copy_(bias_E.masked_fill(self._dropped_PE[place], -torch.inf))

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor
    ) -> None:
        """See `routing.RoutingHook`; every operation has a fixed shape."""
        masks, num_experts = self._masks, self._dropped_PE.shape[1]
        place_T, mass_slot_T = masks.rows(x_TH.shape[0])
        dropped_TE = self._dropped_PE.index_select(0, place_T)
        # Routers may give padding rows ids of -1.
        chosen_TK = expert_ids_TK.long().clamp(0, num_experts - 1)
        add_mass(masks.mass_LMC[self._position], mass_slot_T, weights_TK, dropped_TE.gather(1, chosen_TK))
        masked_TE = logits_TE.masked_fill(dropped_TE, -torch.inf)
        if self._bias_PE is None:
            routers = [(self._router, place_T < masks.num_places)]
        else:
            routers = [(router, place_T == place) for place, router in enumerate(self._biased)]
        for router, mine_T in routers:
            weights, ids = router.route(x_TH, masked_TE, expert_ids_TK.dtype)
            mine_T1 = mine_T.unsqueeze(1)
            weights_TK.copy_(torch.where(mine_T1, weights.to(weights_TK.dtype), weights_TK))
            expert_ids_TK.copy_(torch.where(mine_T1, ids.to(expert_ids_TK.dtype), expert_ids_TK))


class GraphMasks(EngineMasks):
    """The plans of one engine process whose steps are replayed.

    A plan that is released leaves its place to the next one that needs it, the one released longest ago first; until
    then a request that comes late finds it there.

    Args:
        layers: The fused MoE layers of this process; nothing was captured yet.
        device: Where they compute.
        requests: The engine's requests.
        drift_fraction: Share of the steps that measure the dropped gate mass.
        max_rows: Rows of the largest step, padding included.
        num_places: Plans that graphs have room for, at least one.

    Attributes:
        num_places: See above.
        mass_LMC: Sums of gate mass; the last place's are trash.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        device: torch.device,
        requests: Requests,
        drift_fraction: float,
        max_rows: int,
        num_places: int,
    ) -> None:
        super().__init__(layers, device, requests, drift_fraction)
        self.num_places = num_places
        self._slots_per_place = self._trash_slot + 1
        num_slots = (num_places + 1) * self._slots_per_place
        self.mass_LMC = torch.zeros(len(layers), num_slots, 2, dtype=torch.float64, device=device)
        self._place_T = torch.full((max_rows,), num_places, dtype=torch.int64, device=device)
        self._mass_slot_T = torch.full((max_rows,), num_slots - 1, dtype=torch.int64, device=device)
        # Of those that are not in use the one released longest ago comes first.
        self._places: dict[str, int] = {}
        self._written = False
        self._layer_masks = [
            GraphLayerMask(self, position, layer, device) for position, layer in enumerate(self._layers)
        ]
        for layer, mask in zip(layers, self._layer_masks, strict=True):
            layer.set_routing_hook(mask)

    def rows(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Place, and slot among those of all places, of the rows of a layer call: views, valid for every later replay.

        Raises:
            ValueError: There are more rows than were expected.
        """
        if num_rows > self._place_T.shape[0]:
            raise ValueError(f"a layer saw {num_rows} rows, {self._place_T.shape[0]} were expected at most")
        return self._place_T[:num_rows], self._mass_slot_T[:num_rows]

    def _load(self, plan: str, kept: Mapping[int, Sequence[int]]) -> None:
        if plan not in self._places:
            place = self._free_place()
            for layer, mask in zip(self._layers, self._layer_masks, strict=True):
                mask.write(place, kept[layer.index])
            self._places[plan] = place
        self._kept[plan] = kept
        first = self._places[plan] * self._slots_per_place
        self.gate_mass[plan] = GateMass.of(self.mass_LMC[:, first : first + self._slots_per_place])

    def _free_place(self) -> int:
        """A place that no plan in use has; a plan that had it is forgotten there.

        Raises:
            NoPlaceError: There is none.
        """
        untouched = set(range(self.num_places)) - set(self._places.values())
        if untouched:
            return min(untouched)
        for plan in self._places:
            if plan not in self.gate_mass:
                return self._places.pop(plan)
        raise NoPlaceError(
            f"a plan in use is in each of the places that CUDA graphs have ({self.num_places}); delete one that is not "
            f"used, or start with --mask-places {self.num_places + 1}"
        )

    def release(self, plan: str) -> None:
        """Gives up the place of a plan that no request in the engine is under; another may take it."""
        if self.gate_mass.pop(plan, None) is not None:
            self._places[plan] = self._places.pop(plan)

    def unload_all(self) -> None:
        """Forgets every plan: for an engine of which no request is under way."""
        self.gate_mass, self._kept, self._places = {}, {}, {}

    def plan_of(self, request: NewRequest) -> str | None:
        """See `EngineMasks.plan_of`; the full model for a request whose plan lost its place while it waited."""
        try:
            return super().plan_of(request)
        except NoPlaceError:
            logger.error("request %s is answered by the full model: its plan was deleted, and others came", request.id)
            return None

    def begin(self, step: Step) -> None:
        """Notes the rows of the step that begins, by place."""
        measured = bool(self._random.random() < self._drift_fraction)
        num_rows, slot_T = step.slot_T.shape[0], step.certain_slots(self._trash_slot)
        place_T = np.full(num_rows, self.num_places, np.int64)
        for plan, rows in step.plan_rows.items():
            place_T[rows] = self._places[plan]
            if measured:
                self.gate_mass[plan].tokens += rows.shape[0]
        with torch.inference_mode():
            self._place_T[:num_rows].copy_(to_device(place_T, self._device), non_blocking=True)
            if measured:
                mass_slot_T = place_T * self._slots_per_place + slot_T
                self._mass_slot_T[:num_rows].copy_(to_device(mass_slot_T, self._device), non_blocking=True)
        self._written = True
        self._count(step)

    def end(self) -> None:
        """What runs until the next step is a dummy or warm-up run."""
        if self._written:
            with torch.inference_mode():
                self._place_T.fill_(self.num_places)
                self._mass_slot_T.fill_(self.mass_LMC.shape[1] - 1)
            self._written = False
        super().end()
