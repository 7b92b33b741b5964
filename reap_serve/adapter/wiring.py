"""Which recorder a layer gets, and how the layer reaches it: through a tap that lets nothing escape into serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from reap_serve.adapter import engine_view
from reap_serve.adapter.kernel_rows import KernelRows, Scratchpad, can_read
from reap_serve.adapter.tap import Moment, connect
from reap_serve.adapter.tap_kernel import KernelTaps
from reap_serve.record.accumulate import LayerSums
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.record.inline import InlineRecorder
from reap_serve.record.moe_sum import MoeSumRecorder, PersistentSlots, tap_reduction
from reap_serve.record.read import ReadRecorder
from reap_serve.record.recorder import LayerFacts, Recorder
from reap_serve.record.sampling import RowSampler
from reap_serve.record.settings import ObserveSettings

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


# Of rows that all layers together hold until they are measured.
HELD_BYTES = 2**26


class Boundary(Protocol):
    """What stands between a recorder and the request."""

    failures: int

    @property
    def step_recorded(self) -> bool:
        """Whether a row of the current step is recorded."""

    def guarded(self, action: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Runs an action; what it raises ends the recording."""

    def fail(self, error: Exception) -> None:
        """Ends the recording."""


class _Tap:
    """One layer's recorder behind the boundary."""

    def __init__(self, boundary: Boundary, recorder: Recorder) -> None:
        self._boundary = boundary
        self._recorder = recorder

    def observe(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor | None:
        if not self._boundary.step_recorded:
            return None
        return self._boundary.guarded(lambda: self._recorder.observe(x_TH, gate_TK, expert_ids_TK))


class _ReductionTap:
    """One layer's `moe_sum` recorder behind the boundary.

    It acts whether or not the engine records: a graph that is captured now is replayed later. What counts is in the
    labels.
    """

    def __init__(self, boundary: Boundary, recorder: MoeSumRecorder) -> None:
        self._boundary = boundary
        self._recorder = recorder

    def observe(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        self._recorder.observe(x_TH, gate_TK, expert_ids_TK)

    def rows_written(self, rows_TKH: torch.Tensor) -> None:
        if self._boundary.failures == 0:
            try:
                self._recorder.rows_written(rows_TKH)
            except Exception as error:  # noqa: BLE001 - the hook boundary
                self._boundary.fail(error)


def make_recorder(
    settings: ObserveSettings,
    layer: MoERunner,
    facts: LayerFacts,
    sums: LayerSums,
    sampler: RowSampler,
    extra: ExtraSums | None,
    num_layers: int,
) -> Recorder:
    """The recorder of one of the layers: the one asked for, or the reading one where it can do the same for less."""
    if isinstance(sampler, PersistentSlots):
        return MoeSumRecorder(facts, sums, sampler)
    # The optional sums are made of whole rows, in the order of the tokens.
    rows = _kernel_rows(layer, facts) if settings.read_kernel_rows and extra is None else None
    if rows is not None:
        held_rows = HELD_BYTES // (num_layers * rows.row_bytes)
        held_tokens = min(settings.buffer_tokens, held_rows // facts.top_k)
        return ReadRecorder(facts, sums, sampler, rows, held_tokens)
    if settings.recorder == "inline":
        return InlineRecorder(facts, sums, sampler, extra)
    return DeferredRecorder(facts, sums, sampler, settings.buffer_tokens, extra)


def wire(layer: MoERunner, recorder: Recorder, boundary: Boundary, kernel_taps: KernelTaps) -> None:
    """Connects a layer with its recorder."""
    if isinstance(recorder, MoeSumRecorder):
        reduction = _ReductionTap(boundary, recorder)
        tap_reduction(engine_view.reducing_kernel(layer), reduction.rows_written)
        connect(layer, reduction, Moment.BEFORE)
    elif isinstance(recorder, ReadRecorder):
        connect(layer, _Tap(boundary, recorder), Moment.AFTER)
        kernel_taps.add(layer)
    else:
        moment = Moment.INSTEAD if isinstance(recorder, InlineRecorder) else Moment.BEFORE
        connect(layer, _Tap(boundary, recorder), moment)


def _kernel_rows(layer: MoERunner, facts: LayerFacts) -> KernelRows | None:
    """Where the layer's kernel leaves its rows, None where it does not or where they are not as expected."""
    kernel = engine_view.cpu_kernel(layer)
    address = None if kernel is None else engine_view.scratchpad_address()
    if kernel is None or address is None:
        return None
    num_experts, hidden, intermediate = layer.routed_experts.w2_weight.shape
    dtype = layer.moe_config.in_dtype
    rows = KernelRows(Scratchpad(address), num_experts, intermediate, hidden, dtype.itemsize)
    return rows if can_read(rows, facts, hidden, dtype) else None
