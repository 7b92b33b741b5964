"""The recorders by name, and which one a layer gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.record.inline import InlineRecorder
from reap_serve.record.moe_sum import MoeSumRecorder, PersistentSlots
from reap_serve.record.read import ReadRecorder
from reap_serve.record.recorder import LayerFacts, Recorder
from reap_serve.record.sampling import RowSampler
from reap_serve.record.settings import ObserveSettings

# Of outputs that all layers together hold until they are measured.
HELD_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Parts:
    """What a recorder of one layer is made of.

    Attributes:
        layer: The layer.
        sums: Where it adds.
        sampler: Labels and sample of the current step's rows.
        extra: The optional sums, None without them.
        buffer_tokens: Tokens that it may hold until it measures them.
        num_layers: Layers that share the memory for what is held.
    """

    layer: LayerFacts
    sums: LayerSums
    sampler: RowSampler
    extra: ExtraSums | None
    buffer_tokens: int
    num_layers: int


def _inline(parts: Parts) -> Recorder:
    return InlineRecorder(parts.layer, parts.sums, parts.sampler, parts.extra)


def _deferred(parts: Parts) -> Recorder:
    return DeferredRecorder(parts.layer, parts.sums, parts.sampler, parts.buffer_tokens, parts.extra)


def _moe_sum(parts: Parts) -> Recorder:
    return MoeSumRecorder(parts.layer, parts.sums, cast(PersistentSlots, parts.sampler))


def _read(parts: Parts) -> Recorder:
    outputs = parts.layer.kernel_output
    assert outputs is not None
    held = HELD_BYTES // (parts.num_layers * outputs.row_bytes) // parts.layer.top_k
    return ReadRecorder(parts.layer, parts.sums, parts.sampler, outputs, min(parts.buffer_tokens, held))


RecorderKind = Literal["inline", "deferred", "moe_sum", "read"]

RECORDERS: Mapping[RecorderKind, Callable[[Parts], Recorder]] = {
    "inline": _inline,
    "deferred": _deferred,
    "moe_sum": _moe_sum,
    "read": _read,
}


def recorder_kind(settings: ObserveSettings, layer: LayerFacts) -> RecorderKind:
    """The recorder of a layer: the one asked for, or the one that reads where it can do the same for less."""
    if settings.recorder == "moe_sum":
        return "moe_sum"
    # The optional sums are made of whole outputs, in the order of the tokens.
    if layer.kernel_output is not None and settings.read_kernel_rows and not settings.extra_sums:
        return "read"
    return settings.recorder


def recorders_named(kinds: Mapping[int, RecorderKind]) -> str:
    """Which recorders recorded, for people: `read`, or `deferred (layers 4), read (layers 0-3, 5)`.

    Args:
        kinds: The recorder of each layer, by index of the decoder layer.
    """
    layers: dict[RecorderKind, list[int]] = {}
    for index, kind in sorted(kinds.items()):
        layers.setdefault(kind, []).append(index)
    if len(layers) == 1:
        return next(iter(layers))
    return ", ".join(f"{kind} (layers {_ranges(layers[kind])})" for kind in sorted(layers))


def _ranges(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
