"""Observation of one engine process: its recorders, their sums, and the boundary that serving survives."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.adapter import engine_view, seams
from reap_serve.adapter.tap_kernel import KernelTaps
from reap_serve.adapter.wiring import make_recorder, wire
from reap_serve.record.accumulate import LayerSums
from reap_serve.record.extra_sums import ExtraSums, LogitHook
from reap_serve.record.governor import OverheadGovernor
from reap_serve.record.moe_sum import PersistentSlots
from reap_serve.record.quiet import QuietRun
from reap_serve.record.sampling import RowSampler
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums, layer_arrays
from reap_serve.record.steps import StepRows
from reap_serve.serve.mask import EngineMasks
from reap_serve.serve.mask_router import set_routing_hook
from reap_serve.statistics.record import PHASES, Layer, Window

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.core.sched.output import SchedulerOutput

logger = logging.getLogger("reap_serve")

# Of steps, between two looks at what recording costs.
JUDGE_SECONDS = 1.0
# Steps without a hook in a row, at most: only others look whether a file is due.
LONGEST_RUN = 64


class Observer:
    """Records one engine process.

    An exception in a recorder is counted, logged once, stops the recording and marks the statistics incomplete; the
    request is served.

    Args:
        settings: What to record.
        layers: The fused MoE layers of this process.
        device: Where they compute.
        tensor_parallel_size: Ranks that share each expert; their recorders must act in step.
        masks: Plans that requests may be under: such requests are not recorded.
        max_rows: Rows of the largest step, padding included.

    Attributes:
        busy_seconds: How long all steps took; those without a hook count like the one before them.
        own_seconds: What observation has taken of them: the recorders and the hooks.
    """

    def __init__(
        self,
        settings: ObserveSettings,
        layers: list[MoERunner],
        device: torch.device,
        tensor_parallel_size: int,
        masks: EngineMasks,
        max_rows: int,
    ) -> None:
        self.settings = settings
        self.recording = settings.recording
        self.failures = 0
        self.busy_seconds = 0.0
        self.own_seconds = 0.0
        self._masks = masks
        self._earlier_sampled_tokens = 0
        self._judged_seconds = 0.0
        self._step_seconds = 0.0
        self._quiet_run: QuietRun | None = None
        self._rows = StepRows(settings.max_slices)
        self._sampler = (
            PersistentSlots(settings.sample_fraction, self._rows.trash_slot, device, max_rows)
            if settings.recorder == "moe_sum"
            else RowSampler(settings.sample_fraction, self._rows.trash_slot, device)
        )
        # Ranks that measured their own time would sample different tokens and wait for each other for ever.
        budget = settings.overhead_budget if tensor_parallel_size == 1 else None
        self._governor = (
            OverheadGovernor(budget, settings.sample_fraction, settings.buffer_tokens) if budget is not None else None
        )
        self._facts = [engine_view.layer_facts(layer) for layer in layers]
        num_slots = self._rows.trash_slot
        self._sums = [LayerSums(num_slots, facts.num_experts, device) for facts in self._facts]
        self._extra = [
            ExtraSums(settings.extra_sums, num_slots, facts.num_experts, device) if settings.extra_sums else None
            for facts in self._facts
        ]
        self._recorders = [
            make_recorder(settings, layer, facts, sums, self._sampler, extra, len(layers))
            for layer, facts, sums, extra in zip(layers, self._facts, self._sums, self._extra, strict=True)
        ]
        if "logit_gram" in settings.extra_sums:
            self._watch_logits(layers)
        self._kernel_taps = KernelTaps()
        for layer, recorder in zip(layers, self._recorders, strict=True):
            wire(layer, recorder, self, self._kernel_taps)
        self._begin_window()

    def _watch_logits(self, layers: list[MoERunner]) -> None:
        def guarded(action: Callable[[], None]) -> None:
            self.guarded(action)

        for layer, extra in zip(layers, self._extra, strict=True):
            assert extra is not None
            set_routing_hook(layer, LogitHook(layer.router.reap_routing, extra, self._sampler, guarded))

    @property
    def step_recorded(self) -> bool:
        """Whether a row of the current step is recorded."""
        return self.recording and self._sampler.active

    def guarded(self, action: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Runs a recorder's action; what it raises ends the recording, never the request."""
        if not self.recording:
            return None
        started = time.perf_counter()
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self.fail(error)
            return None
        finally:
            self.own_seconds += time.perf_counter() - started

    def fail(self, error: Exception) -> None:
        """Ends the recording of a window that is incomplete from here on."""
        self.failures += 1
        self.recording = False
        self._complete = False
        self._sampler.end()
        logger.error("recording stopped, statistics are incomplete: %s: %s", type(error).__name__, error)

    def requests_change(self, scheduler_output: SchedulerOutput) -> None:
        """Notes requests that come and go with the step that begins."""
        self._rows.finish_requests(scheduler_output.finished_req_ids)
        for request_id, prompt_tokens, arguments in engine_view.new_requests(scheduler_output):
            if not self._masks.admit(request_id, prompt_tokens, arguments):
                self._rows.add_request(request_id, prompt_tokens, arguments)

    def catch_up(self) -> None:
        """Ends the quiet run, if there is one, and counts its steps."""
        run, self._quiet_run = self._quiet_run, None
        if run is None:
            return
        complete = run.end()
        try:
            if not complete:
                self._sampler.cut_short()
            if run.passed:
                self._rows.pass_over(run.passed)
                self._sampler.pass_over(run.passed)
                self.busy_seconds += run.passed * self._step_seconds
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self.fail(error)

    def expect_quiet_run(self) -> QuietRun | None:
        """Draws how many steps like the one that is just over run without a hook; None when none can."""
        decoding = self._rows.decoding
        if self.recording and decoding is not None:
            try:
                self._quiet_run = QuietRun(decoding, self._sampler.steps_until_taken(LONGEST_RUN))
            except Exception as error:  # noqa: BLE001 - the hook boundary
                self.fail(error)
        return self._quiet_run

    def rows_ordered(self, batch: seams.BatchRows) -> None:
        """Labels the rows of the forward pass that follows."""
        if not self.recording:
            return
        try:
            self._sampler.begin(self._rows.label(batch.request_ids, batch.num_scheduled, batch.num_computed))
            if self._sampler.active:
                self._kernel_taps.enter()
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self.fail(error)

    def step_ends(self, busy_seconds: float) -> None:
        """What runs until the next step is a dummy or warm-up run.

        Args:
            busy_seconds: How long the step took.
        """
        if self._sampler.active:
            self._sampler.end()
        if self._kernel_taps.entered:
            try:
                self._kernel_taps.leave()
            except RuntimeError as error:
                self.fail(error)
        self._step_seconds = busy_seconds
        self.busy_seconds += busy_seconds
        if self._governor is not None and self.busy_seconds - self._judged_seconds >= JUDGE_SECONDS:
            self._judged_seconds = self.busy_seconds
            self._sampler.fraction = self._governor.fraction_after(
                self.busy_seconds, self.own_seconds, self.tokens_recorded
            )

    @property
    def tokens_in_window(self) -> int:
        """Tokens recorded since the window began."""
        return self._sampler.sampled_tokens

    @property
    def tokens_recorded(self) -> int:
        """Tokens recorded since the start."""
        return self._earlier_sampled_tokens + self._sampler.sampled_tokens

    @property
    def sample_fraction(self) -> float:
        """Probability with which a token is recorded now."""
        return self._sampler.fraction

    @property
    def complete(self) -> bool:
        """Whether nothing of the window was lost."""
        return self._complete

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Indices of the decoder layers, in the order of the sums."""
        return tuple(facts.index for facts in self._facts)

    def expert_counts(self) -> npt.NDArray[np.int64]:
        """Routed tokens of the window by layer and expert, without those held back."""
        return np.stack([sums.expert_counts() for sums in self._sums])

    def tokens_by_slice(self) -> dict[str, int]:
        """Recorded tokens of the window by slice, without those held back."""
        used = len(self._rows.slices) * len(PHASES)
        tokens_LS = np.stack([sums.tokens_S[:used].cpu().numpy() for sums in self._sums]).reshape(
            len(self._sums), -1, len(PHASES)
        )
        return dict(zip(self._rows.slices, tokens_LS.sum(axis=2).max(axis=0).tolist(), strict=True))

    def start(self) -> None:
        """Records from the next step on."""
        self.catch_up()
        self._rows.settle()
        self.recording = True

    def stop(self) -> None:
        """Measures what is held back, then records no more."""
        self.flush()
        self.recording = False

    def flush(self) -> None:
        """Measures what the recorders hold back."""
        self.catch_up()
        # As in a step, whose tensors cannot be written to otherwise.
        with torch.inference_mode():
            for recorder in self._recorders:
                self.guarded(recorder.flush)

    def reset(self) -> None:
        """Starts a new window with sums of nothing."""
        self.flush()
        for sums in (*self._sums, *self._extra):
            if sums is not None:
                sums.reset()
        self._rows.reset()
        self._earlier_sampled_tokens += self._sampler.sampled_tokens
        self._sampler.reset()
        self._begin_window()

    def snapshot(self) -> RankSums:
        """The sums of the window so far, in the main memory."""
        self.flush()
        rows, sampler = self._rows, self._sampler
        num_slices = len(rows.slices)
        # Of few tokens none may have been drawn: then the probability stands for the fraction.
        fraction = sampler.sampled_tokens / sampler.real_tokens if sampler.sampled_tokens else sampler.fraction
        arrays = [
            layer_arrays(sums, num_slices, len(PHASES), extra)
            for sums, extra in zip(self._sums, self._extra, strict=True)
        ]
        window = Window(
            id=self._window_id,
            started=self._window_started,
            ended=_now(),
            recorder=self.settings.recorder,
            requests=rows.requests,
            prompt_tokens_total=rows.prompt_tokens_total,
            prompt_tokens_computed=rows.prompt_tokens_computed,
            sample_fraction=fraction,
            complete=self._complete,
        )
        layers = tuple(Layer(index=facts.index, name=facts.name) for facts in self._facts)
        return RankSums.stack(window, layers, tuple(rows.slices), arrays)

    def _begin_window(self) -> None:
        self._window_id = uuid.uuid4().hex
        self._window_started = _now()
        self._complete = True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
