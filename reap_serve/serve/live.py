"""One rank of a serving engine: its windows, its plans by name, and what `/v1/reap` tells of it.

Everything here runs in the worker between two steps: at the end of a step, or in an RPC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from reap_serve.adapter.stand_in import SkippedRouting
from reap_serve.record.requests import Requests
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.records import JsonValue
from reap_serve.serve.live_status import (
    GateMassReport,
    MaskReport,
    PlanEntry,
    RankStatus,
    SliceLimits,
    layer_counts,
)
from reap_serve.serve.mask import EngineMasks
from reap_serve.serve.shadow import EngineShadow
from reap_serve.serve.steps import EngineSteps
from reap_serve.serve.windows import LiveSetup, Windows


@dataclasses.dataclass(frozen=True, slots=True)
class RankFacts:
    """What does not change while an engine serves.

    Attributes:
        mask_refusal: Why this engine cannot mask, None when it can.
        shadow_refusal: Why dropped gate mass cannot be measured although there is a sidecar.
        weights_bytes: Memory of the weights.
        engine: Which of the data-parallel engines behind the server this is, from 0.
    """

    mask_refusal: str | None
    shadow_refusal: str | None
    weights_bytes: int
    engine: int = 0


class LiveEngine(EngineSteps):
    """One rank of a serving engine.

    Args:
        requests: The engine's requests.
        recorder: Its recorders.
        masks: Its plans.
        shadow: Its shadow routers, None on a model that was not pruned.
        setup: None keeps the statistics in memory.
        facts: What does not change while it serves.
        skipped_routing: Of an engine that compiles its model.
    """

    def __init__(
        self,
        requests: Requests,
        recorder: StepRecorder,
        masks: EngineMasks,
        shadow: EngineShadow | None,
        setup: LiveSetup | None,
        facts: RankFacts,
        skipped_routing: SkippedRouting | None = None,
    ) -> None:
        super().__init__(requests, recorder, masks, shadow, skipped_routing)
        self.plans: dict[str, PlanEntry] = {}
        self.default: str | None = None
        self._once_named: set[str] = set()
        self._facts = facts
        self._windows = Windows(recorder, setup)

    def between_steps(self) -> None:
        """Offers the sums when a file is due."""
        self._windows.offer_if_due()

    def flush(self) -> bool:
        """Writes what was recorded so far, in the calling thread.

        Returns:
            False where some of it can only be measured at the next forward pass: call again.
        """
        return self._windows.flush()

    def reset(self) -> None:
        """Forgets what was recorded and not yet written, the totals and the slices' names; files stay."""
        self._windows.reset()
        for gate_mass in self.masks.gate_mass.values():
            gate_mass.reset()
        if self.shadow is not None:
            self.shadow.reset()
        self.requests.forget_slices()

    def step_fails(self) -> None:
        """The forward pass raised."""
        super().step_fails()
        self._windows.rescue()

    def farewell(self) -> None:
        """The server ends in order, and all of its engines have written what they recorded."""
        self._windows.farewell()

    def close(self) -> None:
        """Writes what was recorded; the engine stops."""
        self._windows.close()

    def expert_counts(self) -> npt.NDArray[np.int64]:
        """Routed tokens by layer and expert since the start or the last reset, without those held back."""
        return self._windows.expert_counts()

    def tokens_by_slice(self) -> dict[str, int]:
        """Recorded tokens by slice since the start or the last reset."""
        return self._windows.tokens_by_slice()

    def tick(self) -> None:
        """What has to happen on an idle engine, too."""
        self.between_steps()
        for gate_mass in self.masks.gate_mass.values():
            gate_mass.decay()
        if self.shadow is not None:
            self.shadow.settle()
            self.shadow.gate_mass.decay()
        self._release_plans()

    def status(self) -> RankStatus:
        """What this rank is doing."""
        recorder = self.recorder
        counts_LE = self.expert_counts()
        return RankStatus(
            recording=recorder.recording,
            recorder=recorder.recorders,
            complete=self._windows.complete,
            failures=recorder.failures + self._windows.lost,
            tokens_observed=recorder.tokens_recorded,
            tokens_masked=self.masks.masked_tokens,
            sample_fraction=recorder.sample_fraction,
            overhead_budget=recorder.settings.overhead_budget,
            held_bytes=recorder.held_bytes + (0 if self.shadow is None else self.shadow.held_bytes),
            recorder_seconds=recorder.own.seconds,
            busy_seconds=recorder.busy.seconds,
            slices=self.tokens_by_slice(),
            slice_limits=SliceLimits(
                max_slices=self.requests.max_slices,
                known=tuple(self.requests.slices),
                allowed=tuple(sorted(self.requests.allowed)),
                beyond=dict(self.requests.beyond_limits),
            ),
            layers=tuple(map(layer_counts, recorder.layer_indices, counts_LE)),
            weights_bytes=self._facts.weights_bytes,
            writer=self._windows.writer_report(),
            mask=MaskReport(refusal=self._facts.mask_refusal, plans=self.plans, default=self.default),
            gate_mass=self._gate_mass_report(),
            engine=self._facts.engine,
        )

    def _gate_mass_report(self) -> GateMassReport:
        shadow = self.shadow
        if shadow is not None:
            shadow.settle()
        return GateMassReport(
            pruned=shadow is not None,
            refusal=self._facts.shadow_refusal if shadow is None else shadow.refusal,
            served={} if shadow is None else shadow.gate_mass.fractions(self.requests.slices),
            plans={plan: mass.fractions(self.requests.slices) for plan, mass in self.masks.gate_mass.items()},
        )

    def load_plan(self, name: str, entry: Mapping[str, JsonValue], kept: Mapping[int, Sequence[int]]) -> None:
        """Loads a checked plan under a name.

        Args:
            name: Of the plan.
            entry: Its `PlanEntry`.
            kept: Kept experts by index of the decoder layer.

        Raises:
            ValueError: This engine cannot mask, or too many plans are loaded.
        """
        if self._facts.mask_refusal is not None:
            raise ValueError(self._facts.mask_refusal)
        loaded = PlanEntry.model_validate(entry)
        # A plan that goes by the name now makes room for this one, unless requests are under it.
        before = self.plans.get(name)
        if before is not None and before.id != loaded.id:
            del self.plans[name]
        self._release_plans()
        try:
            self.masks.load(loaded.id, kept, answer_only=loaded.phase == "decode")
        except ValueError:
            if before is not None:
                self.plans[name] = before
            raise
        self.plans[name] = loaded
        self._once_named.add(loaded.id)
        self._release_plans()

    def load_masks(self, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        """Puts masks that were checked against the model in the place of all plans; they have ids and no names.

        For an engine of which no request is under way.

        Raises:
            ValueError: This engine cannot mask, or these are too many.
        """
        if self._facts.mask_refusal is not None:
            raise ValueError(self._facts.mask_refusal)
        self.masks.unload_all()
        self.plans, self.default = {}, None
        for plan, layers in kept.items():
            self.masks.load(plan, layers)

    def take_gates(self) -> bytes:
        """The watched gates since the last call: `gate_watch.read_gates` reads them."""
        return self.masks.watch.take()

    def forget_plan(self, name: str) -> None:
        """Takes a name away; requests under its plan finish under it, then its place is free."""
        self.plans.pop(name, None)
        if self.default == name:
            self.default = None
        self._release_plans()

    def _release_plans(self) -> None:
        """Frees the places of plans that have no name and no request."""
        unnamed = self._once_named & set(self.masks.gate_mass) - {entry.id for entry in self.plans.values()}
        for plan in sorted(unnamed - self.requests.plans()) if unnamed else ():
            self.masks.release(plan)

    def set_default(self, name: str | None) -> None:
        """The plan of requests that name none; None is the full model.

        Raises:
            ValueError: No plan has that name.
        """
        if name is not None and name not in self.plans:
            raise ValueError(f"no plan is called {name}")
        self.default = name
