"""The recorders by name, and which one a layer gets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.captured import CapturedRecorder, Measure
from reap_serve.record.captured_rows import CapturedRows
from reap_serve.record.choice import LayerCircumstances, RecorderKind, choose
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.record.inline import InlineRecorder
from reap_serve.record.lockstep import Lockstep, LockstepRecorder
from reap_serve.record.moe_sum import MoeSumRecorder, PersistentSlots
from reap_serve.record.read import ReadRecorder
from reap_serve.record.recorder import LayerFacts, Recorder
from reap_serve.record.sampling import RowSampler
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.verdicts import Verdicts

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
        captured: Rows that graphs gather, None where none do.
        lockstep: Of data-parallel ranks, None on others.
    """

    layer: LayerFacts
    sums: LayerSums
    sampler: RowSampler
    extra: ExtraSums | None
    buffer_tokens: int
    num_layers: int
    captured: CapturedRows | None = None
    lockstep: Lockstep | None = None


def _inline(parts: Parts) -> Recorder:
    return InlineRecorder(parts.layer, parts.sums, parts.sampler, parts.extra)


def _deferred(parts: Parts) -> Recorder:
    return DeferredRecorder(parts.layer, parts.sums, parts.sampler, parts.buffer_tokens, parts.extra)


def _moe_sum(parts: Parts) -> Recorder:
    return MoeSumRecorder(parts.layer, parts.sums, cast(PersistentSlots, parts.sampler))


def _captured(parts: Parts) -> Recorder:
    assert parts.captured is not None
    measure = Measure(parts.layer, parts.sums, parts.extra)
    return CapturedRecorder(len(parts.captured.recorders), parts.captured, parts.sampler, measure)


def _read(parts: Parts) -> Recorder:
    outputs = parts.layer.kernel_output
    assert outputs is not None
    held = HELD_BYTES // (parts.num_layers * outputs.row_bytes) // parts.layer.top_k
    return ReadRecorder(parts.layer, parts.sums, parts.sampler, outputs, min(parts.buffer_tokens, held))


def _lockstep(parts: Parts) -> Recorder:
    assert parts.lockstep is not None
    return LockstepRecorder(parts.layer, parts.sums, parts.lockstep)


RECORDERS: Mapping[RecorderKind, Callable[[Parts], Recorder]] = {
    "inline": _inline,
    "deferred": _deferred,
    "captured": _captured,
    "moe_sum": _moe_sum,
    "read": _read,
    "lockstep": _lockstep,
}


# What users know a recorder by: under graphs `deferred` works otherwise.
NAMES: Mapping[RecorderKind, str] = {
    "inline": "inline",
    "deferred": "deferred",
    "captured": "deferred",
    "moe_sum": "moe_sum",
    "read": "read",
    "lockstep": "deferred",
}

# Asked for by name, these give way to `read`, which makes the same sums for less.
SAME_AS_READ = frozenset({"inline", "deferred"})


def recorder_kind(settings: ObserveSettings, layer: LayerFacts, *, graphs: bool = False) -> RecorderKind:
    """The recorder of a layer: the one asked for, or the one that reads where it can do the same for less.

    Args:
        settings: What was asked for.
        layer: The layer.
        graphs: Steps are replayed from captured graphs.
    """
    # The optional sums are made of whole outputs, in the order of the tokens.
    reads = layer.kernel_output is not None and settings.read_kernel_rows and not settings.extra_sums
    if settings.recorder == "auto":
        chosen = choose(
            LayerCircumstances(
                rows_stay=reads,
                rows_pass=layer.adds_apart,
                graphs=graphs,
                every_token=settings.overhead_budget is None and settings.sample_fraction == 1.0,
                outputs_served=settings.outputs_served,
                extra_sums=bool(settings.extra_sums),
            )
        )
    else:
        chosen = "read" if reads and settings.recorder in SAME_AS_READ else settings.recorder
    return "captured" if graphs and chosen == "deferred" else chosen


def recorder_kinds(
    settings: ObserveSettings, layers: Sequence[LayerFacts], graphs: bool, draft_tokens: bool, lockstep: bool
) -> tuple[RecorderKind, ...]:
    """The recorder of each layer.

    Args:
        settings: What was asked for.
        layers: The layers.
        graphs: See `recorder_kind`.
        draft_tokens: The engine verifies draft tokens: what a kernel is about to add cannot wait for a verdict.
        lockstep: The rank has to measure with others.
    """
    if lockstep:
        return tuple("lockstep" for _ in layers)
    if draft_tokens and settings.recorder == "auto":
        settings = settings.model_copy(update={"recorder": "deferred"})
    return tuple(recorder_kind(settings, layer, graphs=graphs) for layer in layers)


def make_sampler(
    kinds: Collection[RecorderKind],
    fraction: float,
    trash_slot: int,
    device: torch.device,
    max_rows: int,
    verdicts: Verdicts | None,
) -> RowSampler:
    """What samples the rows of all layers; see the arguments of `StepRecorder` and of `RowSampler`."""
    if "moe_sum" in kinds:
        return PersistentSlots(fraction, trash_slot, device, max_rows)
    return RowSampler(fraction, trash_slot, device, verdicts=verdicts)


def recorders_named(kinds: Mapping[int, RecorderKind]) -> str:
    """Which recorders recorded, for people: `read`, or `deferred (layers 4), read (layers 0-3, 5)`.

    Args:
        kinds: The recorder of each layer, by index of the decoder layer.
    """
    layers: dict[str, list[int]] = {}
    for index, kind in sorted(kinds.items()):
        layers.setdefault(NAMES[kind], []).append(index)
    if len(layers) == 1:
        return next(iter(layers))
    return ", ".join(f"{name} (layers {_ranges(indices)})" for name, indices in sorted(layers.items()))


def _ranges(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
