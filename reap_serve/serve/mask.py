"""Virtual pruning: rows of a running full model routed as the pruned checkpoint would route them.

A row under a plan is routed anew over the kept experts alone: their logits and correction biases, in ascending order of
their ids, go through the router's own computation, as in the pruned checkpoint, and the chosen positions are translated
back to ids. That equals logits of -inf for the dropped experts, and stays right where -inf would not: a sigmoid router
adds the correction bias to a score of 0, and group-limited routers score each group by its best members.
A custom routing function may hold tensors of its own by expert id, so it gets the -inf logits.

A request keeps the plan under which it entered. A plan may route the answer alone: the full model reads the prompt,
and the kept experts write (SlimWise, arXiv 2609.34117). As a mask that is a question of quality: all experts stay in
memory, and no step is faster.

Requests under a plan, their prompts included, are left out of the statistics, which stay those of the full model.

Axes: R requests, T tokens, H hidden, E experts, D kept experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.adapter.routing import RoutedLayer, Router
from reap_serve.record.requests import Requests
from reap_serve.record.settings import MAX_PLANS
from reap_serve.record.step import NewRequest, Step
from reap_serve.serve.gate_mass import GateMass
from reap_serve.serve.gate_watch import GateWatch

PLAN_ARGUMENT = "reap_plan_id"
MAX_PLANS_EVER = 4096


@dataclass(frozen=True, slots=True)
class PlanRows:
    """Rows of a step under one plan.

    Attributes:
        plan: Id of the plan.
        rows: Their indices, int64.
        slots: Slice and phase of each, int64.
        measured: Whether this step measures the dropped gate mass.
    """

    plan: str
    rows: torch.Tensor
    slots: torch.Tensor
    measured: bool


class LayerPlan:
    """One layer under one plan.

    Args:
        router: The layer's router.
        kept: Kept experts, ascending.
        num_experts: Experts of the layer.
        device: Where the logits are.
    """

    def __init__(self, router: Router, kept: Sequence[int], num_experts: int, device: torch.device) -> None:
        self._kept_D = torch.tensor(kept, dtype=torch.int64, device=device)
        self.dropped_E = torch.ones(num_experts, dtype=torch.bool, device=device)
        self.dropped_E[self._kept_D] = False
        self._router = router
        bias_E = router.correction_bias
        bias_D = None if bias_E is None else bias_E[self._kept_D]
        self._compact = None if router.is_custom else router.with_experts(len(kept), bias_D)

    def route(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, ids_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate weights [T, K] and expert ids [T, K] over the kept experts."""
        if self._compact is None:
            return self._router.route(x_TH, logits_TE.masked_fill(self.dropped_E, -torch.inf), ids_dtype)
        weights_TK, position_TK = self._compact.route(x_TH, logits_TE[:, self._kept_D], ids_dtype)
        return weights_TK, self._kept_D[position_TK.long()].to(position_TK.dtype)


class LayerMask:
    """The plans of one layer: overwrites the router's choice for rows under a plan."""

    def __init__(self, masks: EngineMasks, layer_position: int) -> None:
        self._masks = masks
        self._position = layer_position
        self.plans: dict[str, LayerPlan] = {}

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor
    ) -> None:
        """See `routing.RoutingHook`."""
        self._masks.watch.see(self._position, weights_TK, expert_ids_TK)
        for group in self._masks.step:
            plan, rows = self.plans[group.plan], group.rows
            if group.measured:
                dropped_TK = plan.dropped_E[expert_ids_TK[rows].long()]
                self._masks.gate_mass[group.plan].add(self._position, group.slots, weights_TK[rows], dropped_TK)
            weights, ids = plan.route(x_TH[rows], logits_TE[rows], expert_ids_TK.dtype)
            weights_TK[rows] = weights.to(weights_TK.dtype)
            expert_ids_TK[rows] = ids


class EngineMasks:
    """The plans loaded into one engine process, and who is under which.

    Plans go by an id that stands for their content. A plan that is no longer wanted is released: it gives its place
    up, and its few kilobytes of kept ids stay, since requests that name it may still be waiting in vLLM's queue.

    Args:
        layers: The fused MoE layers of this process.
        device: Where they compute.
        requests: The engine's requests.
        drift_fraction: Share of the steps that measure the dropped gate mass.

    Attributes:
        watch: Requests of the full model whose gates are wanted; it sees them once a plan is loaded.
    """

    def __init__(
        self, layers: Sequence[RoutedLayer], device: torch.device, requests: Requests, drift_fraction: float
    ) -> None:
        self.step: tuple[PlanRows, ...] = ()
        self.gate_mass: dict[str, GateMass] = {}
        self.masked_tokens = 0
        self.watch = GateWatch(len(layers), device)
        self.answer_only: set[str | None] = set()
        self._layers = layers
        self._device = device
        self._drift_fraction = drift_fraction
        self._random = np.random.default_rng(0)
        self._trash_slot = requests.trash_slot
        self._hooks = [LayerMask(self, position) for position in range(len(layers))]
        self._hooked = False
        self._kept: dict[str, Mapping[int, Sequence[int]]] = {}

    def load(self, plan: str, kept: Mapping[int, Sequence[int]], *, answer_only: bool = False) -> None:
        """Loads a plan that was checked against the model.

        Args:
            plan: Its id.
            kept: Kept experts by index of the decoder layer, ascending; layers of other processes are passed over.
            answer_only: Whether it routes the answer's rows alone.

        Raises:
            ValueError: Too many plans are loaded.
        """
        if plan in self.gate_mass:
            return
        if len(self.gate_mass) >= MAX_PLANS:
            raise ValueError(f"{MAX_PLANS} plans are loaded; delete one that is not used")
        if len(self._kept) >= MAX_PLANS_EVER and plan not in self._kept:
            raise ValueError(f"{MAX_PLANS_EVER} plans were loaded since the start")
        if answer_only:
            self.answer_only.add(plan)
        self._load(plan, kept)

    def _load(self, plan: str, kept: Mapping[int, Sequence[int]]) -> None:
        self._kept[plan] = kept
        self.gate_mass[plan] = GateMass(len(self._layers), self._trash_slot, self._device)
        for layer, hook in zip(self._layers, self._hooks, strict=True):
            hook.plans[plan] = LayerPlan(layer.router, kept[layer.index], layer.num_experts, self._device)
        if not self._hooked:
            self._hooked = True
            for layer, hook in zip(self._layers, self._hooks, strict=True):
                layer.set_routing_hook(hook)

    def unload_all(self) -> None:
        """Forgets every plan, so that others find room: for an engine of which no request is under way."""
        self.gate_mass, self._kept = {}, {}
        for hook in self._hooks:
            hook.plans = {}

    def release(self, plan: str) -> None:
        """Gives up the place of a plan that no request in the engine is under; a request that comes late loads it."""
        if self.gate_mass.pop(plan, None) is not None:
            for hook in self._hooks:
                del hook.plans[plan]

    def plan_of(self, request: NewRequest) -> str | None:
        """Id of the plan under which a request enters, and so not into the statistics; None for the full model.

        Raises:
            ValueError: It names a plan that is not loaded.
        """
        plan = (request.arguments or {}).get(PLAN_ARGUMENT)
        # Without a plan loaded nothing at the server's door keeps strangers from naming one.
        if plan is None or not self._kept:
            return None
        if plan in self._kept and plan not in self.gate_mass:
            self._load(str(plan), self._kept[str(plan)])
        if plan not in self.gate_mass:
            raise ValueError(f"the request {request.id} names the plan {plan!r}, which is not loaded")
        return str(plan)

    def begin(self, step: Step) -> None:
        """Notes the rows of the step that begins, by plan."""
        measured = bool(self._random.random() < self._drift_fraction)
        # Draft tokens are routed by the plan, too, but are no traffic yet.
        slot_T = step.certain_slots(self._trash_slot)
        self.step = tuple(
            PlanRows(
                plan,
                torch.from_numpy(rows).to(self._device),
                torch.from_numpy(slot_T[rows]).to(self._device),
                measured,
            )
            for plan, rows in step.plan_rows.items()
        )
        self._count(step)

    def _count(self, step: Step) -> None:
        drafts = step.draft_rows
        self.masked_tokens += sum(int((~np.isin(rows, drafts)).sum()) for rows in step.plan_rows.values())

    def judge(self, step: Step, taken_T: npt.NDArray[np.bool_]) -> None:
        """The step's draft tokens were verified: counts those that were taken."""
        drafts = step.draft_rows
        drafts = drafts[taken_T[drafts]]
        self.masked_tokens += sum(int(np.isin(rows, drafts).sum()) for rows in step.plan_rows.values())

    def end(self) -> None:
        """What runs until the next step is a dummy or warm-up run."""
        self.step = ()
        self.watch.end()
