"""What recorders need of vLLM's layers, and how the layers reach the recorders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from reap_serve.adapter import engine_view, layer_view, replicas
from reap_serve.adapter.kernel_rows import KernelRows, Scratchpad, can_read
from reap_serve.adapter.tap import connect
from reap_serve.adapter.tap_kernel import KernelTaps
from reap_serve.record.recorder import LayerFacts, Moment
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.record.tap import SumTap, Tap

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


def facts_of(layer: MoERunner, settings: ObserveSettings, max_rows: int) -> LayerFacts:
    """What a recorder needs of a layer whose weights are in place."""
    moving = replicas.moves_experts(layer)
    # Behind the dispatch of data-parallel ranks a kernel's memory holds parts of the rows of all of them.
    together = layer.moe_config.dp_size > 1
    facts = dataclasses.replace(
        layer_view.layer_facts(layer),
        call_rows=None if engine_view.device_type() == "cpu" or together else max_rows,
        # Where experts have replicas, what a kernel is about to add does not tell of which one it is.
        adds_apart=layer_view.reducing_kernel(layer) is not None and not moving,
        shape=layer_view.row_shape(layer),
    )
    if settings.recorder == "moe_sum" or not settings.read_kernel_rows or together:
        return facts
    return dataclasses.replace(facts, kernel_output=_kernel_output(layer, facts))


def wire(layers: Sequence[MoERunner], recorder: StepRecorder) -> None:
    """Connects the layers of an engine process with their recorders."""
    kernel_taps = KernelTaps()
    for layer, tap in zip(layers, recorder.taps, strict=True):
        wire_layer(layer, tap, kernel_taps)
    recorder.apparatus = kernel_taps


def wire_layer(layer: MoERunner, tap: Tap, kernel_taps: KernelTaps) -> None:
    """Connects a layer with its recorder."""
    connect(layer, tap)
    if isinstance(tap, SumTap):
        tap_reduction(layer_view.reducing_kernel(layer), tap.rows_written)
    elif tap.moment is Moment.AFTER:
        kernel_taps.add(layer)


def tap_reduction(experts: object, see: Callable[[torch.Tensor], None]) -> None:
    """Puts `see` in front of a kernel's `moe_sum`.

    Args:
        experts: The kernel: an object with a method `moe_sum(input, output, ...)`.
        see: Gets the rows [T, K, H]. Never raises.
    """
    reduce_rows = experts.moe_sum  # type: ignore[attr-defined]

    def moe_sum(input: torch.Tensor, output: torch.Tensor, *args: object, **kwargs: object) -> object:
        see(input)
        return reduce_rows(input, output, *args, **kwargs)

    experts.moe_sum = moe_sum  # type: ignore[attr-defined]


def _kernel_output(layer: MoERunner, facts: LayerFacts) -> KernelRows | None:
    """Where the layer's kernel leaves its outputs, None where it does not or where they are not as expected."""
    kernel = layer_view.cpu_kernel(layer)
    address = None if kernel is None else engine_view.scratchpad_address()
    if kernel is None or address is None:
        return None
    num_experts, hidden, intermediate = layer.routed_experts.w2_weight.shape
    dtype = layer.moe_config.in_dtype
    rows = KernelRows(Scratchpad(address), num_experts, intermediate, hidden, dtype.itemsize)
    return rows if can_read(rows, facts, hidden, dtype) else None
