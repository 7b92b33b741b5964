"""What two plans disagree on."""

from __future__ import annotations

from reap_serve.errors import MismatchError
from reap_serve.model import Fingerprint, require_same_model
from reap_serve.plan.record import Plan
from reap_serve.records import Record


class LayerDifference(Record):
    """One layer.

    Attributes:
        index: Index of the decoder layer.
        only_a: Experts that only the first plan keeps, ascending.
        only_b: Experts that only the second plan keeps, ascending.
        overlap: Experts that both keep by experts that either keeps (Jaccard index).
    """

    index: int
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    overlap: float


class PlanDifference(Record):
    """Two plans.

    Attributes:
        criteria: Of the first and the second.
        kept: Experts that each keeps, over all layers.
        changed_fraction: Experts on which they disagree, of all.
        overlap: Mean of the layers' overlaps.
        layers: By layer.
    """

    criteria: tuple[str, str]
    kept: tuple[int, int]
    changed_fraction: float
    overlap: float
    layers: tuple[LayerDifference, ...]


def difference(a: Plan, b: Plan) -> PlanDifference:
    """Compares two plans of one model.

    Raises:
        MismatchError: They are bound to different models, or differ in layers or numbers of experts.
    """
    if isinstance(a.model, Fingerprint) and isinstance(b.model, Fingerprint):
        require_same_model(a.model, b.model, "the first plan", "the second")
    shapes = [[(layer.index, layer.num_experts) for layer in plan.layers] for plan in (a, b)]
    if shapes[0] != shapes[1]:
        raise MismatchError("the plans differ in their layers or numbers of experts", "compare plans of one model")
    layers = []
    for left, right in zip(a.layers, b.layers, strict=True):
        kept_a, kept_b = set(left.kept), set(right.kept)
        layers.append(
            LayerDifference(
                index=left.index,
                only_a=tuple(sorted(kept_a - kept_b)),
                only_b=tuple(sorted(kept_b - kept_a)),
                overlap=len(kept_a & kept_b) / len(kept_a | kept_b),
            )
        )
    num_experts = sum(count for _, count in shapes[0])
    return PlanDifference(
        criteria=(a.criterion, b.criterion),
        kept=(sum(len(layer.kept) for layer in a.layers), sum(len(layer.kept) for layer in b.layers)),
        changed_fraction=sum(len(layer.only_a) + len(layer.only_b) for layer in layers) / num_experts,
        overlap=sum(layer.overlap for layer in layers) / len(layers),
        layers=tuple(layers),
    )
