"""What a worker tells the server of itself: aggregates only, as records that cross vLLM's RPC as JSON."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from reap_serve.records import Record


class LayerBalance(Record):
    """How evenly a layer's experts are used.

    Attributes:
        layer: Index of the decoder layer.
        routed_tokens: Tokens times experts per token.
        num_experts: Experts of the layer.
        unseen: Experts without a token.
        load_balance: Jain's index of the counts c, (sum c)^2 / (E sum c^2): 1 when all are used alike, 1/E when one is;
            None without tokens.
    """

    layer: int
    routed_tokens: int
    num_experts: int
    unseen: int
    load_balance: float | None


def balance_of(layer: int, counts_E: npt.NDArray[np.int64]) -> LayerBalance:
    """The balance of one layer from its experts' counts."""
    total, squares = float(counts_E.sum()), float((counts_E.astype(np.float64) ** 2).sum())
    return LayerBalance(
        layer=layer,
        routed_tokens=int(total),
        num_experts=counts_E.shape[0],
        unseen=int((counts_E == 0).sum()),
        load_balance=total * total / (counts_E.shape[0] * squares) if squares else None,
    )


class LayerCounts(Record):
    """Routed tokens of each expert of a layer; they stay between the workers and the server.

    Attributes:
        layer: Index of the decoder layer.
        counts: By expert.
    """

    layer: int
    counts: tuple[int, ...]


def layer_counts(layer: int, counts_E: npt.NDArray[np.int64]) -> LayerCounts:
    """The counts of one layer."""
    return LayerCounts(layer=layer, counts=tuple(counts_E.tolist()))


class WriterReport(Record):
    """What became of the files.

    Attributes:
        directory: Where they are.
        age_seconds: Since the last file, or since the start.
        files_written: By this process.
        tokens_written: In them.
        tokens_pending: Recorded and handed over, not yet written.
        write_failures: Attempts that failed.
        last_error: Of the latest attempt, None when it succeeded.
    """

    directory: str
    age_seconds: float
    files_written: int
    tokens_written: int
    tokens_pending: int
    write_failures: int
    last_error: str | None


PlanPhase = Literal["all", "decode"]


class PlanEntry(Record):
    """A loaded plan.

    Attributes:
        id: Stands for the kept experts of all layers, and the phase.
        phase: `all`, or `decode` where the full model reads the prompt and the plan routes the answer alone.
        experts_kept: Per layer.
        criterion: Of the plan.
        bound: Whether the plan carries the served model's fingerprint.
        planned_dropped_gate_mass: By slice, as predicted from the plan's statistics; empty when the plan has none.
    """

    id: str
    phase: PlanPhase = "all"
    experts_kept: int
    criterion: str
    bound: bool
    planned_dropped_gate_mass: dict[str, float] = {}


class MaskReport(Record):
    """The plans of an engine.

    Attributes:
        refusal: Why it cannot mask, None when it can.
        plans: By name.
        default: Name of the plan of requests that choose none; None is the full model.
    """

    refusal: str | None
    plans: dict[str, PlanEntry]
    default: str | None


class GateMassReport(Record):
    """Dropped gate mass.

    Attributes:
        pruned: The model is a pruned checkpoint with a sidecar, so that all traffic is measured.
        refusal: Why it is not measured although there is a sidecar.
        served: Of a pruned checkpoint, by slice.
        plans: Of requests under a plan, by the plan's id and slice.
    """

    pruned: bool
    refusal: str | None
    served: dict[str, float]
    plans: dict[str, dict[str, float]]


class SliceLimits(Record):
    """How many slices are told apart, and what did not fit.

    Attributes:
        max_slices: Slices told apart, `default` and `other` included.
        known: Those told apart now; `reset` forgets those without a request in the engine.
        allowed: Names that requests may bring besides `default`; empty allows all.
        beyond: Requests in the slice `other` since the start or the last reset, by the name of the limit that put them
            there: `max_slices` or `slices`.
    """

    max_slices: int
    known: tuple[str, ...]
    allowed: tuple[str, ...]
    beyond: dict[str, int]


class RankStatus(Record):
    """One rank.

    Attributes:
        recording: Whether tokens are recorded now.
        recorder: Which recorder.
        complete: False when a recorder stopped early or a window was lost since the last reset.
        failures: Of the recorder.
        tokens_observed: Tokens recorded since the start.
        tokens_masked: Tokens of requests under a plan since the start; they are not recorded.
        sample_fraction: Probability with which a token is recorded.
        overhead_budget: Share of the engine's time that recording may take, None where nothing bounds it.
        held_bytes: Memory of the rows that CUDA graphs gather, and of those held until they are measured.
        recorder_seconds: Time that recording took since the start.
        busy_seconds: Time of all steps since the start.
        slices: Recorded tokens by slice since the start or the last reset.
        slice_limits: What slices are told apart.
        layers: Experts' counts of this rank's layers, since the start or the last reset.
        weights_bytes: Memory of this rank's weights.
        writer: None when nothing is written.
        mask: Plans.
        gate_mass: Drift.
        engine: Which of the data-parallel engines behind the server it belongs to, from 0.
    """

    recording: bool
    recorder: str
    complete: bool
    failures: int
    tokens_observed: int
    tokens_masked: int
    sample_fraction: float
    overhead_budget: float | None = None
    held_bytes: int = 0
    recorder_seconds: float
    busy_seconds: float
    slices: dict[str, int]
    slice_limits: SliceLimits
    layers: tuple[LayerCounts, ...]
    weights_bytes: int
    writer: WriterReport | None
    mask: MaskReport
    gate_mass: GateMassReport
    engine: int = 0
