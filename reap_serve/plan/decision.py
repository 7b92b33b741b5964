"""From statistics and a request to the experts that stay.

Axes: S slices, L layers with routed experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from reap_serve.errors import PlanError
from reap_serve.plan.budget import global_counts, uniform_count
from reap_serve.plan.guards import Guards, drop_first, guard, require_room
from reap_serve.plan.limits import CountLimits, ModelLimits, count_limits
from reap_serve.plan.objective import MaxMin, maximise_worst
from reap_serve.plan.ranking import keep_order, keep_prefix
from reap_serve.plan.record import Plan
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.plan.sizes import CheckpointBytes
from reap_serve.statistics.record import Header, Statistics
from reap_serve.statistics.saliency import MixedSums, SliceTerm, mix_slices, saliency, slice_terms

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a decision rests on, whatever its size.

    Attributes:
        request: What was asked.
        model: Limits of the model.
        limits: Counts that model and engine take.
        layer_indices: Indices of the decoder layers on axis L.
        slices: Names on axis S: those of the mixture that have tokens.
        terms: Their sums and scales.
        sums: The mixture.
        saliency_LE: The criterion on the mixture.
        share_LE: The same as a fraction of the layer's sum.
        share_SLE: The same for each slice alone. By `reap` where the criterion is `random`, which measures nothing.
        guards: Experts that stay or go whatever the criterion says.
        notes: What is wrong with the statistics without forbidding their use.
        unsound: Experts that are dropped first because of their weights, by index of the layer and id, and why.
    """

    request: PlanRequest
    model: ModelLimits
    limits: CountLimits
    layer_indices: tuple[int, ...]
    slices: tuple[str, ...]
    terms: tuple[SliceTerm, ...]
    sums: MixedSums
    saliency_LE: Floats
    share_LE: Floats
    share_SLE: Floats
    guards: Guards
    notes: tuple[str, ...]
    unsound: Mapping[tuple[int, int], str] = field(default_factory=dict)

    def unsound_kept(self, decision: Decision) -> Iterator[tuple[int, int]]:
        """Unsound experts that stay all the same, because more stay than are sound."""
        rows = {index: row for row, index in enumerate(self.layer_indices)}
        return (key for key in self.unsound if decision.kept_LE[rows[key[0]], key[1]])


@dataclass(frozen=True, slots=True)
class Decision:
    """What stays.

    Attributes:
        kept_LE: The experts.
        max_min: How well the worst slice was served, under that objective.
    """

    kept_LE: Bools
    max_min: MaxMin | None

    def count_by_layer(self) -> Ints:
        """Experts that each layer keeps, [L]."""
        count_L: Ints = self.kept_LE.sum(axis=1)
        return count_L


def kept_mask(plan: Plan, num_experts: int) -> Bools:
    """What a plan keeps, as a decision has it: kept_LE, for layers of that many experts."""
    kept_LE = np.zeros((len(plan.layers), num_experts), np.bool_)
    for row, layer in enumerate(plan.layers):
        kept_LE[row, list(layer.kept)] = True
    return kept_LE


def gather(
    statistics: Statistics,
    request: PlanRequest,
    model: ModelLimits,
    unsound: Mapping[tuple[int, int], str] | None = None,
) -> Evidence:
    """Computes what decisions rest on.

    Args:
        statistics: What was observed.
        request: What is asked for.
        model: Limits of the model.
        unsound: Experts to drop first, by index of the layer and id, and why.

    Raises:
        PlanError: The limits contradict each other, or there is no token.
        RequestError: The criterion or a slice of the mixture does not exist.
    """
    weights = dict(request.mix) or None
    terms = tuple(term for term in slice_terms(statistics, weights) if term.sums.layer_token_count_L.any())
    if not terms:
        raise PlanError("the statistics hold no token", "observe traffic first")
    sums = mix_slices(statistics, weights)
    saliency_LE = saliency(sums, request.criterion, request.seed)
    measure = measure_of(request.criterion)
    layer_indices = tuple(layer.index for layer in statistics.header.layers)
    guards = guard(
        sums.activation_max_LE,
        np.sum([term.sums.token_count_LE for term in terms], axis=0),
        preserve_super_experts=request.preserve_super_experts,
        min_tokens=request.min_tokens,
        unseen=request.unseen,
    )
    return Evidence(
        request=request,
        model=model,
        limits=count_limits(model, request.target),
        layer_indices=layer_indices,
        slices=tuple(term.name for term in terms),
        terms=terms,
        sums=sums,
        saliency_LE=saliency_LE,
        share_LE=shares(saliency_LE),
        share_SLE=np.stack([shares(saliency(term.sums, measure)) for term in terms]),
        guards=drop_first(guards, _mask(unsound, layer_indices, saliency_LE.shape)) if unsound else guards,
        notes=_notes(statistics.header),
        unsound=unsound or {},
    )


def _mask(experts: Iterable[tuple[int, int]], layer_indices: tuple[int, ...], shape: tuple[int, ...]) -> Bools:
    mask_LE = np.zeros(shape, np.bool_)
    for layer, expert in experts:
        mask_LE[layer_indices.index(layer), expert] = True
    return mask_LE


def _notes(header: Header) -> tuple[str, ...]:
    num_incomplete = sum(not window.complete for window in header.windows)
    if not num_incomplete:
        return ()
    return (
        f"{num_incomplete} of {len(header.windows)} windows of observation are incomplete: tokens were lost or "
        "recording stopped early",
    )


def measure_of(criterion: str) -> str:
    """The criterion by which retained saliency is measured: its own, or `reap` for `random`."""
    return "reap" if criterion == "random" else criterion


def shares(saliency_LE: Floats) -> Floats:
    """Saliency as a fraction of its layer's sum; equal shares where a layer has none."""
    total_L1 = saliency_LE.sum(axis=1, keepdims=True)
    equal_LE = np.full(saliency_LE.shape, 1 / saliency_LE.shape[1])
    share_LE: Floats = np.divide(saliency_LE, total_L1, out=equal_LE, where=total_L1 > 0)
    return share_LE


def decide(evidence: Evidence, size: Size, checkpoint: CheckpointBytes | None = None) -> Decision:
    """Chooses the experts that stay.

    Raises:
        PlanError: No choice meets the size, the limits and the guards together.
    """
    request, guards, num_groups = evidence.request, evidence.guards, evidence.model.num_groups
    choose = _chooser(evidence, size, checkpoint)
    kept_LE = choose(evidence.saliency_LE, evidence.share_LE)
    require_room(guards, kept_LE.sum(axis=1), num_groups, evidence.layer_indices)
    if request.objective == "mean":
        return Decision(kept_LE, None)
    result = maximise_worst(
        evidence.share_SLE,
        lambda share_LE: choose(share_LE, share_LE),
        kept_LE,
        guards.precedence_LE == 0,
        num_groups,
    )
    return Decision(result.kept_LE, result)


def _chooser(evidence: Evidence, size: Size, checkpoint: CheckpointBytes | None) -> Callable[[Floats, Floats], Bools]:
    """A function from scores and their shares to the experts that stay.

    Scores order the experts of a layer. Shares matter under a global budget alone: by them layers compete for places.
    """
    request, limits, guards = evidence.request, evidence.limits, evidence.guards
    precedence_LE, num_groups = guards.precedence_LE, evidence.model.num_groups

    def counts_for(share_LE: Floats, order_LE: Ints) -> Ints:
        return global_counts(size, limits, share_LE, order_LE, guards.guarded_by_layer(), checkpoint)

    def choose_global(score_LE: Floats, share_LE: Floats) -> Bools:
        order_LE = keep_order(score_LE, precedence_LE, num_groups)
        return keep_prefix(order_LE, counts_for(share_LE, order_LE))

    if request.budget == "global" and not request.pad_to_max:
        return choose_global
    if request.pad_to_max:
        order_LE = keep_order(evidence.saliency_LE, precedence_LE, num_groups)
        count = int(counts_for(evidence.share_LE, order_LE).max())
    else:
        count = uniform_count(size, limits, checkpoint)
    count_L = np.full(len(evidence.layer_indices), count)
    return lambda score_LE, _: keep_prefix(keep_order(score_LE, precedence_LE, num_groups), count_L)
