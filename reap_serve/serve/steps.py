"""A step of the engine, in the order in which it happens: begin, rows, forward, end.

begin    the scheduler has chosen: requests leave, then others enter, each under its plan or the full model
rows     the order of the rows is final: they become a `Step`, which recorders, masks and the shadow router take up
forward  vLLM computes; its layers call the recorders' taps, its routers the masks and the shadow router
end      all of them let go of the step; what runs until the next one is a dummy or warm-up run
sampled  only where the step verified draft tokens: which of them were taken, and so count
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from reap_serve.adapter.stand_in import SkippedRouting
from reap_serve.record.requests import Requests
from reap_serve.record.step import BatchRows, NewRequest, Step
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.serve.mask import EngineMasks
from reap_serve.serve.shadow import EngineShadow


class EngineSteps:
    """Follows the steps of one engine process; the adapter calls it.

    Args:
        requests: The engine's requests.
        recorder: Its recorders.
        masks: Its plans.
        shadow: Its shadow routers, None on a model that was not pruned.
        skipped_routing: Of an engine that compiles its model.

    Attributes:
        rows_wanted: Whether the rows of the step that has begun matter.
    """

    def __init__(
        self,
        requests: Requests,
        recorder: StepRecorder,
        masks: EngineMasks,
        shadow: EngineShadow | None,
        skipped_routing: SkippedRouting | None = None,
    ) -> None:
        self.rows_wanted = False
        self.requests = requests
        self.recorder = recorder
        self.masks = masks
        self.shadow = shadow
        self._skipped_routing = skipped_routing
        self._drafting: Step | None = None

    def step_begins(self, finished: Collection[str], new: Sequence[NewRequest]) -> None:
        """The scheduler's choice is there."""
        self.recorder.busy.start()
        self.recorder.own.start()
        if self._skipped_routing is not None:
            self._skipped_routing.step_begins()
        if finished:
            self.requests.finish(finished)
            self.masks.watch.finish(finished)
        for request in new:
            self.masks.watch.admit(request)
            plan = self.masks.plan_of(request)
            self.requests.enter(request, plan, answer_only=plan in self.masks.answer_only)
        self.rows_wanted = (
            self.recorder.recording
            or self.requests.under_plan > 0
            or self.shadow is not None
            or self.masks.watch.in_use
        )
        self.recorder.own.stop()

    def rows_ordered(self, batch: BatchRows) -> None:
        """The forward pass follows."""
        self.recorder.own.start()
        step = self.requests.step(batch, recorded=self.recorder.recording)
        if self.recorder.recording:
            self.recorder.begin(step)
        if step.plan_rows:
            self.masks.begin(step)
        if self.masks.watch.in_use:
            self.masks.watch.begin(batch)
        if self.shadow is not None:
            self.shadow.begin(step)
        self._drafting = step if step.drafts else None
        self.recorder.own.stop()

    def step_ends(self) -> None:
        """The engine is between two steps."""
        self.recorder.own.start()
        self.rows_wanted = False
        self.recorder.end()
        self.masks.end()
        if self.shadow is not None:
            self.shadow.end()
        self.recorder.own.stop()
        self.recorder.busy.stop()
        self.between_steps()

    def rows_sampled(self, sampled: Sequence[Sequence[int]]) -> None:
        """The draft tokens of the step that has ended were verified.

        Args:
            sampled: Tokens of each request of the batch; see `Requests.judge`.
        """
        step, self._drafting = self._drafting, None
        if step is None:
            return
        self.recorder.own.start()
        taken_T = self.requests.judge(step, sampled)
        self.recorder.judge(taken_T)
        self.masks.judge(step, taken_T)
        self.recorder.own.stop()

    def step_fails(self) -> None:
        """The forward pass raised, and the step is over."""
        self.recorder.step_failed()
        if self.shadow is not None:
            self.shadow.discard()
        self.step_ends()

    def between_steps(self) -> None:
        """What a serving engine does there; nothing here."""
