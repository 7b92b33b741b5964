"""What a decision will cost and keep, predicted before a byte moves: the `summary` of a plan.

Axes: S slices, L layers, E experts.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from reap_serve.errors import PlanError
from reap_serve.plan.decision import Decision, Evidence, measure_of, shares
from reap_serve.plan.instability import instability
from reap_serve.plan.limits import count_notes
from reap_serve.plan.objective import retained_fractions
from reap_serve.plan.ranking import keep_order, keep_prefix
from reap_serve.plan.record import Plan
from reap_serve.plan.sizes import CheckpointBytes
from reap_serve.records import Record
from reap_serve.statistics.saliency import MEANS, saliency

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class LayerRetained(Record):
    """Retained saliency of one layer, on the mixture and on each slice alone."""

    index: int
    mixture: float
    slices: dict[str, float]


class Retained(Record):
    """The criterion's sum over the kept experts divided by its sum over all, each slice on its own traffic.

    Attributes:
        criterion: What is summed: the plan's criterion, or `reap` where that is `random`.
        mixture: On the mixture, mean over the layers.
        worst_slice: Name of the slice that retains least.
        slices: By slice, mean over the layers.
        layers: By layer.
    """

    criterion: str
    mixture: float
    worst_slice: str
    slices: dict[str, float]
    layers: tuple[LayerRetained, ...]


class GuardSummary(Record):
    """What the guards decided.

    Attributes:
        super_experts: [layer index, expert] of each.
        unjudged_experts: Experts below --min-tokens.
        unjudged_kept: Of those, how many stay.
    """

    super_experts: tuple[tuple[int, int], ...]
    unjudged_experts: int
    unjudged_kept: int


class BytesSummary(Record):
    """Bytes of the checkpoint's tensors before and after."""

    before: int
    after: int


class MaxMinSummary(Record):
    """Retained saliency of the worst slice, and the proven bound that no choice under the same limits exceeds."""

    worst_fraction: float
    bound_fraction: float


class InstabilitySummary(Record):
    """Expected fraction of keep/drop decisions that as much traffic again would change, see `instability`."""

    mean: float
    layers: tuple[float, ...]


class Summary(Record):
    """Predictions of a plan.

    Attributes:
        num_experts: Experts per layer before.
        keep_experts: Experts per layer after; the largest count where layers differ.
        keep_experts_per_layer: Count of each layer.
        keep_fraction: Kept of all experts.
        needs_patch: Counts differ, so that stock vLLM cannot serve the result.
        retained_saliency: See `Retained`.
        retained_output: The same for the sum of g|f| by slice whatever the criterion, so that plans of different
            criteria can be compared: the share of what the experts added to the residual stream, in norm.
        instability: None for criteria of which no standard error is known.
        dropped_gate_mass: Share of the gate weights that falls on dropped experts, by slice, mean over the layers: what
            a live server measures to see traffic move. None in plans of earlier versions.
        guards: What the guards decided.
        bytes: None when the model was not given.
        max_min: None under another objective.
        slice_overlap: Jaccard index between the plans that each slice would make for itself with the same counts, in
            the order of `retained_saliency.slices`.
        notes: What is allowed but worth knowing.
    """

    num_experts: int
    keep_experts: int
    keep_experts_per_layer: tuple[int, ...]
    keep_fraction: float
    needs_patch: bool
    retained_saliency: Retained
    retained_output: dict[str, float]
    dropped_gate_mass: dict[str, float] | None = None
    instability: InstabilitySummary | None
    guards: GuardSummary
    bytes: BytesSummary | None
    max_min: MaxMinSummary | None
    slice_overlap: tuple[tuple[Annotated[float, Field(ge=0, le=1)], ...], ...]
    notes: tuple[str, ...]

    @model_validator(mode="after")
    def _slices_are_the_same_everywhere(self) -> Summary:
        names = self.retained_saliency.slices.keys()
        by_slice = [self.retained_output, *(layer.slices for layer in self.retained_saliency.layers)]
        if any(found.keys() != names for found in by_slice):
            raise ValueError("predictions of one slice are missing")
        if {len(self.slice_overlap), *map(len, self.slice_overlap)} != {len(names)}:
            raise ValueError("the overlap is not that of these slices")
        return self


def summarise(evidence: Evidence, decision: Decision, checkpoint: CheckpointBytes | None) -> Summary:
    """Predictions for a decision."""
    counts = tuple(decision.count_by_layer().tolist())
    output_SLE = np.stack([shares(saliency(term.sums, "weighted_ean_sum")) for term in evidence.terms])
    gate_SLE = np.stack([shares(saliency(term.sums, "gate_sum")) for term in evidence.terms])
    notes = [*evidence.notes, *count_notes(evidence.model, evidence.request.target, counts)]
    if len(set(counts)) > 1:
        notes.append(
            "counts differ by layer: stock vLLM reads one count; prune with --unequal-layers and serve with the patch "
            "layer-counts in patches/, or plan with --pad-to-max"
        )
    if checkpoint is not None and checkpoint.mtp_expert_bytes:
        notes.append(
            "multi-token-prediction layers keep the ids of the trunk's last layer: their own experts are not observed"
        )
    # On the embedded model max-min under `reap` raises the worst slice's retained saliency and its divergence too;
    # under sums it lowers the divergence at half (bench/plan_max_min.py).
    if evidence.request.objective == "max-min" and evidence.request.criterion in MEANS:
        notes.append(
            f"{evidence.request.criterion} is a mean over routed tokens, so an expert that a slice hardly uses can "
            "count for much of its retained saliency: compare the slices before serving, or maximise weighted_ean_sum"
        )
    guards, max_min = evidence.guards, decision.max_min
    instability_L = instability(evidence, decision)
    return Summary(
        num_experts=evidence.model.num_experts,
        keep_experts=max(counts),
        keep_experts_per_layer=counts,
        keep_fraction=float(decision.kept_LE.mean()),
        needs_patch=len(set(counts)) > 1,
        retained_saliency=_retained(evidence, decision.kept_LE),
        retained_output=_by_slice(evidence.slices, retained_fractions(output_SLE, decision.kept_LE)),
        instability=None
        if instability_L is None
        else InstabilitySummary(mean=float(instability_L.mean()), layers=tuple(instability_L.tolist())),
        dropped_gate_mass=_by_slice(evidence.slices, 1.0 - retained_fractions(gate_SLE, decision.kept_LE)),
        guards=GuardSummary(
            super_experts=tuple(
                (evidence.layer_indices[layer], expert) for layer, expert in np.argwhere(guards.super_LE).tolist()
            ),
            unjudged_experts=int(guards.unjudged_LE.sum()),
            unjudged_kept=int((guards.unjudged_LE & decision.kept_LE).sum()),
        ),
        bytes=None
        if checkpoint is None
        else BytesSummary(
            before=checkpoint.at_uniform(evidence.model.num_experts),
            after=checkpoint.at(decision.count_by_layer()),
        ),
        max_min=None
        if max_min is None
        else MaxMinSummary(worst_fraction=max_min.worst_fraction, bound_fraction=max_min.bound_fraction),
        slice_overlap=_slice_overlap(evidence, decision),
        notes=tuple(notes),
    )


def summary_of(plan: Plan) -> Summary:
    """The predictions in a plan.

    Raises:
        PlanError: It has none, as plans written by hand.
    """
    try:
        return Summary.model_validate(plan.summary)
    except ValidationError:
        raise PlanError("the plan carries no predictions of this version", "make it with reap-serve plan") from None


def _retained(evidence: Evidence, kept_LE: Bools) -> Retained:
    measure = measure_of(evidence.request.criterion)
    mixture_LE = shares(saliency(evidence.sums, measure))
    mixture_L = np.where(kept_LE, mixture_LE, 0.0).sum(axis=1)
    retained_SL = np.where(kept_LE, evidence.share_SLE, 0.0).sum(axis=2)
    retained_S = retained_fractions(evidence.share_SLE, kept_LE)
    return Retained(
        criterion=measure,
        mixture=float(mixture_L.mean()),
        worst_slice=evidence.slices[int(retained_S.argmin())],
        slices=_by_slice(evidence.slices, retained_S),
        layers=tuple(
            LayerRetained(
                index=index,
                mixture=float(mixture_L[position]),
                slices=_by_slice(evidence.slices, retained_SL[:, position]),
            )
            for position, index in enumerate(evidence.layer_indices)
        ),
    )


def _slice_overlap(evidence: Evidence, decision: Decision) -> tuple[tuple[float, ...], ...]:
    own_SX = np.stack(
        [
            keep_prefix(
                keep_order(share_LE, evidence.guards.precedence_LE, evidence.model.num_groups),
                decision.count_by_layer(),
            ).reshape(-1)
            for share_LE in evidence.share_SLE
        ]
    ).astype(np.int64)
    common_SS = np.einsum("sx,tx->st", own_SX, own_SX)
    either_SS = 2 * decision.kept_LE.sum() - common_SS
    return tuple(tuple(row) for row in (common_SS / either_SS).tolist())


def _by_slice(slices: tuple[str, ...], value_S: Floats) -> dict[str, float]:
    return dict(zip(slices, value_S.tolist(), strict=True))
