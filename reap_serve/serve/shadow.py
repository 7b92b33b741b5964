"""The shadow router: on a sampled share of steps, the full router is applied to what a pruned model's router sees.

It tells how much gate mass the full model would have given to dropped experts on the traffic of today. It changes
nothing that is served.

Axes: T tokens, H hidden, E experts before pruning, D kept experts, K experts per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from reap_serve.adapter.routing import RoutedLayer, Router, RoutingHook
from reap_serve.record.requests import Requests
from reap_serve.record.step import Step
from reap_serve.serve.gate_mass import GateMass
from reap_serve.serve.sidecar import FullRouter
from reap_serve.shown_text import shown_logger

logger = shown_logger("reap_serve")

# Rounding of a half-precision router: larger differences mean that the router sees something else than the experts do.
LOGITS_TOLERANCE = 0.05


class RoutersDifferError(Exception):
    """The full router, given what the served one is given, finds other logits for the kept experts."""


class ShadowRouter:
    """The full router of one layer.

    Args:
        router: The layer's router.
        full: The router before pruning.
        device: Where the logits are.

    Attributes:
        hidden: H.
        num_kept: D.
        dtype: In which it computes.
    """

    def __init__(self, router: Router, full: FullRouter, device: torch.device) -> None:
        self._kept_D = torch.tensor(full.kept, dtype=torch.int64, device=device)
        self._weight_EH = full.weight_EH.to(device)
        self.hidden, self.num_kept, self.dtype = self._weight_EH.shape[1], len(full.kept), self._weight_EH.dtype
        self._bias_E: torch.Tensor | None = None
        self._dropped_E = torch.ones(full.weight_EH.shape[0], dtype=torch.bool, device=device)
        self._dropped_E[self._kept_D] = False
        self._checked = False
        correction_D, correction_E = router.correction_bias, None
        for vector_E in full.vectors_E:
            vector = vector_E.to(device)
            kept_D = vector[self._kept_D]
            if correction_D is not None and torch.equal(kept_D.to(correction_D.dtype), correction_D):
                correction_E = vector.to(correction_D.dtype)
            else:
                self._bias_E = vector
        self._router = router.with_experts(full.weight_EH.shape[0], correction_E)

    def choose(
        self, x_TH: torch.Tensor, logits_TD: torch.Tensor, ids: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate weights [T, K] of the experts that it chooses, and whether each is dropped.

        Args:
            x_TH: What the served router was given.
            logits_TD: What that router made of it; the first of them are compared with those of the full one.
            ids: Of the kernel's expert ids.

        Raises:
            RoutersDifferError: They are others.
        """
        logits_TE = self._logits(x_TH)
        if not self._checked:
            largest = float(logits_TD.abs().max())
            difference = float((logits_TE[:, self._kept_D].float() - logits_TD.float()).abs().max())
            if difference > LOGITS_TOLERANCE * max(largest, 1.0):
                raise RoutersDifferError(f"the full router's logits differ by {difference:.3g} from the served ones")
            self._checked = True
        weights_TK, ids_TK = self._router.route(x_TH, logits_TE.to(logits_TD.dtype), ids)
        return weights_TK, self._dropped_E[ids_TK.long()]

    def load(self, x_TH: torch.Tensor, logits: torch.dtype, ids: torch.dtype) -> None:
        """Routes rows in vain: what is compiled at its first call is compiled then."""
        self._router.route(x_TH, self._logits(x_TH).to(logits), ids)

    def _logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x_TH.to(self.dtype), self._weight_EH, self._bias_E)


class LayerShadow:
    """Shows one layer's rows to its full router.

    Args:
        shadow: Of the engine.
        position: Of the layer in this process.
        router: The full router.
    """

    def __init__(self, shadow: EngineShadow, position: int, router: ShadowRouter) -> None:
        self._shadow = shadow
        self._position = position
        self._router = router

    def routed(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor
    ) -> None:
        """See `routing.RoutingHook`; writes nothing."""
        slot_T = self._shadow.slots
        if slot_T is None:
            return
        rows = slice(0, slot_T.shape[0])
        with self._shadow.guarded():
            weights, dropped_TK = self._router.choose(x_TH[rows], logits_TE[rows], expert_ids_TK.dtype)
            self._shadow.gate_mass.add(self._position, slot_T, weights, dropped_TK)


class EngineShadow:
    """The shadow routers of one engine process.

    Args:
        layers: The fused MoE layers of this process.
        full: The routers before pruning.
        device: Where the layers compute.
        requests: The engine's requests.
        fraction: Share of the steps that are measured.

    Attributes:
        gate_mass: What was measured.
        refusal: Why nothing is measured any more, None while it is.
        slots: Of the rows of the current step, None when it is not measured.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        full: Mapping[int, FullRouter],
        device: torch.device,
        requests: Requests,
        fraction: float,
    ) -> None:
        self.gate_mass = GateMass(len(layers), requests.trash_slot, device)
        self.refusal: str | None = None
        self.slots: torch.Tensor | None = None
        self._trash_slot = requests.trash_slot
        self._device = device
        self._fraction = fraction
        self._random = np.random.default_rng(0)
        for position, layer in enumerate(layers):
            layer.set_routing_hook(self._hook(position, ShadowRouter(layer.router, full[layer.index], device)))

    def _hook(self, position: int, router: ShadowRouter) -> RoutingHook:
        return LayerShadow(self, position, router)

    @property
    def held_bytes(self) -> int:
        """Memory of rows that wait to be measured; here none do."""
        return 0

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What is raised inside ends the measure; serving goes on."""
        try:
            yield
        except RoutersDifferError as error:
            self._give_up(str(error))
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if self.refusal is None:
            logger.error("dropped gate mass is not measured: %s", reason)
        self.refusal, self.slots = reason, None
        self.gate_mass.reset()

    def begin(self, step: Step) -> None:
        """Notes the rows of the step that begins, if it is one of those that are measured."""
        chosen = self.refusal is None and self._random.random() < self._fraction
        slot_T = step.certain_slots(self._trash_slot)
        self.slots = torch.from_numpy(slot_T).to(self._device) if chosen else None

    def end(self) -> None:
        """What runs until the next step is a dummy or warm-up run."""
        self.slots = None

    def discard(self) -> None:
        """The step failed: what waits of it to be measured counts for nothing."""
        self.slots = None

    def settle(self) -> None:
        """Measures what waits to be measured, between two steps; here nothing does."""

    def reset(self) -> None:
        """Forgets what was measured, and what waits to be."""
        self.gate_mass.reset()
