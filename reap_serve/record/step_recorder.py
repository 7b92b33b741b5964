"""Records the steps of one engine process: its recorders, their sums, and the boundary that serving survives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from reap_serve.record.captured_rows import CapturedRows, Graphs, room_for
from reap_serve.record.captured_steps import CapturedSteps
from reap_serve.record.extra_sums import LogitTap
from reap_serve.record.lockstep import Lockstep, Peers
from reap_serve.record.open_window import OpenWindow
from reap_serve.record.pace import Pace
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.recorders import RECORDERS, Parts, make_sampler, recorder_kinds, recorders_named
from reap_serve.record.requests import Requests
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums
from reap_serve.record.step import Step
from reap_serve.record.tap import Apparatus, make_tap
from reap_serve.record.verdicts import Verdicts
from reap_serve.shown_text import shown_logger

logger = shown_logger("reap_serve")


class StepRecorder:
    """Records the steps of one engine process.

    An exception in a recorder is counted, logged once, stops the recording and marks the statistics incomplete; the
    request is served.

    Args:
        settings: What to record.
        layers: What recorders need of the fused MoE layers of this process, in the order of the model.
        device: Where they compute.
        tensor_parallel_size: Ranks that share each expert; their recorders must act in step.
        requests: The engine's requests.
        max_rows: Rows of the largest step, padding included.
        graphs: Graphs that steps are replayed from, None where none are.
        agree: Gives every rank the first one's value; None where there is one rank.
        draft_tokens: Whether the engine verifies draft tokens.
        peers: The data-parallel ranks, with which this one has to measure; None when it measures alone.

    Attributes:
        recording: Whether steps are recorded.
        failures: Exceptions so far.
        recorders: Which recorders record, for people.
        taps: What to connect to each layer.
        logit_taps: What to connect to each layer's router; none without the sum of logits.
        apparatus: What has to be in place in recorded steps, None when nothing has.
        busy: How long all steps took.
        own: What observation has taken of them: the recorders, the hooks, and what graphs do for them.
    """

    def __init__(
        self,
        settings: ObserveSettings,
        layers: Sequence[LayerFacts],
        device: torch.device,
        tensor_parallel_size: int,
        requests: Requests,
        max_rows: int,
        graphs: Graphs | None = None,
        agree: Callable[[float], float] | None = None,
        draft_tokens: bool = False,
        peers: Peers | None = None,
    ) -> None:
        self.settings = settings
        self.recording = settings.recording
        self.failures = 0
        self.apparatus: Apparatus | None = None
        self._graphs = graphs
        self._torn = False
        self._earlier_sampled_tokens = 0
        self._apparatus_entered = False
        self._requests = requests
        verdicts = None
        if draft_tokens:
            verdicts = Verdicts(requests.trash_slot, settings.buffer_tokens + 2 * max_rows, device)
        self._verdicts = verdicts
        self._layers = tuple(layers)
        self.kinds = recorder_kinds(settings, layers, graphs is not None, draft_tokens, peers is not None)
        budget, fraction, held = settings.overhead_budget, settings.sample_fraction, settings.buffer_tokens
        assert budget is None or tensor_parallel_size == 1 or agree is not None
        gathering = [layer.shape for layer, kind in zip(layers, self.kinds, strict=True) if kind == "captured"]
        rows: CapturedRows | None = None
        if graphs is not None and gathering:
            rows, fraction = room_for(graphs, gathering, fraction, bounded=budget is not None, held=held, device=device)
            held = rows.held_rows
        self._pace = Pace(budget, fraction, held, device, agree)
        self.busy, self.own = self._pace.busy, self._pace.own
        self._captured = None if rows is None or graphs is None else CapturedSteps(rows, graphs, self.own)
        fraction = self._pace.fraction
        self._sampler = make_sampler(self.kinds, fraction, requests.trash_slot, device, max_rows, verdicts)
        self._window = OpenWindow(layers, requests, device, settings.extra_sums, verdicts)
        # A call's rows are to fit where those of a step do.
        capacity = max(1, min(settings.buffer_tokens, max_rows // max(layer.top_k for layer in layers)))
        self._lockstep = None if peers is None else Lockstep(peers, self._sampler, capacity, self.fail)
        self.recorders = recorders_named(dict(zip((layer.index for layer in layers), self.kinds, strict=True)))
        window, held = self._window, settings.buffer_tokens
        parts = [
            Parts(layer, sums, self._sampler, extra, held, len(layers), rows, self._lockstep)
            for layer, sums, extra in zip(layers, window.sums, window.extra, strict=True)
        ]
        self.taps = [make_tap(self, RECORDERS[kind](each)) for kind, each in zip(self.kinds, parts, strict=True)]
        watched = [extra for extra in window.extra if extra is not None and settings.sums_of_logits]
        self.logit_taps = [LogitTap(extra, self._sampler, self.guarded) for extra in watched]

    def begin(self, step: Step) -> None:
        """The forward pass of a step follows."""
        try:
            if self._verdicts is not None and self._verdicts.pending:
                raise RuntimeError("a step ended without telling which of its draft tokens are taken")
            self._sampler.begin(step.full_slot_T, step.draft_rows)
            if self._captured is not None:
                self._captured.begin(self._sampler.sample, step.full_slot_T.shape[0])
            if self._sampler.active and self.apparatus is not None:
                self._apparatus_entered = True
                self.apparatus.enter()
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self.fail(error)

    def end(self) -> None:
        """The step is over; what runs until the next one is a dummy or warm-up run."""
        if self._captured is not None:
            try:
                self._captured.end()
            except Exception as error:  # noqa: BLE001 - the hook boundary
                self.fail(error)
        if self._sampler.active:
            self._sampler.end()
        if self._apparatus_entered and self.apparatus is not None:
            self._apparatus_entered = False
            try:
                self.apparatus.leave()
            except RuntimeError as error:
                self.fail(error)
        self._pace.step_is_over(self.tokens_recorded)
        self._sampler.fraction = self._pace.fraction

    def judge(self, taken_T: npt.NDArray[np.bool_]) -> None:
        """The step's draft tokens were verified: counts what was taken of them.

        Args:
            taken_T: Whether each row of the step counts.
        """
        try:
            self._sampler.tell(taken_T)
            self._window.settle()
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self.fail(error)

    @property
    def step_recorded(self) -> bool:
        """Whether a row of the current step is recorded."""
        return self.recording and self._sampler.active

    def guarded(self, action: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Runs a recorder's action; what it raises ends the recording, never the request."""
        if not self.recording:
            return None
        self.own.start()
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self.fail(error)
            return None
        finally:
            self.own.stop()

    @property
    def capturing(self) -> bool:
        """Whether a graph is being captured now."""
        return self._graphs is not None and self._graphs.capturing()

    def fail(self, error: Exception) -> None:
        """Ends the recording of a window that is incomplete from here on."""
        self.failures += 1
        self.recording = False
        self._window.complete = False
        if self.capturing:
            # The graph lacks a layer for good; what else was done here would be part of it.
            if not self._torn:
                logger.error("a graph does not record, nor will this engine: %s: %s", type(error).__name__, error)
            self._torn = True
            return
        self._sampler.end()
        if self._captured is not None:
            self._captured.discard()
        logger.error("recording stopped, statistics are incomplete: %s: %s", type(error).__name__, error)

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
    def held_bytes(self) -> int:
        """Memory of the rows that graphs gather and of those held after them; 0 without graphs."""
        return 0 if self._captured is None else self._captured.rows.num_bytes

    @property
    def complete(self) -> bool:
        """Whether nothing of the window was lost."""
        return self._window.complete

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Indices of the decoder layers, in the order of the sums."""
        return tuple(layer.index for layer in self._layers)

    def expert_counts(self) -> npt.NDArray[np.int64]:
        """Routed tokens of the window by layer and expert, without those held back."""
        return self._window.expert_counts()

    def tokens_by_slice(self) -> dict[str, int]:
        """Recorded tokens of the window by slice, without those held back."""
        return self._window.tokens_by_slice()

    def start(self) -> None:
        """Records from the next step on; an engine with a graph that lacks a layer never does."""
        self._requests.settle()
        self.recording = not self._torn
        if self._torn:
            logger.error("nothing is recorded: a graph was captured without its recorder; start the engine again")

    def stop(self) -> None:
        """Measures what is held back, then records no more."""
        self.flush()
        self.recording = False

    def settle(self) -> bool:
        """Whether all that was recorded when this was first called is measured.

        A rank that measures alone does so here. One that cannot asks the others, and has an answer at the next forward
        pass; see `Lockstep`.
        """
        if self._lockstep is not None:
            return self._lockstep.settle()
        self.flush()
        return True

    def lose_held(self) -> None:
        """No forward pass follows: what is still held is lost, and the window incomplete if something is."""
        if self._lockstep is not None and self._lockstep.held:
            self._lockstep.discard()
            self._window.complete = False

    def step_failed(self) -> None:
        """The engine's forward pass raised: what belongs to it is lost."""
        self._window.complete = False
        if self._captured is not None:
            self._captured.discard()

    def flush(self) -> None:
        """Measures what the recorders hold back; where ranks measure together, see `settle`."""
        # As in a step, whose tensors cannot be written to otherwise.
        with torch.inference_mode():
            for tap in self.taps:
                self.guarded(tap.recorder.flush)

    def reset(self) -> None:
        """Starts a new window with sums of nothing."""
        if self._lockstep is not None:
            self._lockstep.discard()
        self._sampler.reject_drafts()
        self._window.settle()
        self.flush()
        self.next_window()

    def next_window(self) -> None:
        """Starts a new window; what is held back belongs to it."""
        self._window.next()
        held = 0 if self._lockstep is None else self._lockstep.held
        self._earlier_sampled_tokens += self._sampler.sampled_tokens - held
        self._sampler.reset(held)

    def snapshot(self) -> RankSums:
        """The sums of the window so far, in the main memory."""
        self.flush()
        sampler = self._sampler
        # Of few tokens none may have been drawn: then the probability stands for the fraction.
        fraction = sampler.sampled_tokens / sampler.real_tokens if sampler.sampled_tokens else sampler.fraction
        return self._window.snapshot(self.recorders, fraction)
