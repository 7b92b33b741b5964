"""What `stats drift` finds: how far layers, experts and slices moved, each against chance."""

from __future__ import annotations

from reap_serve.records import Record


class LayerDrift(Record):
    """One layer.

    Attributes:
        layer: Name.
        index: Index of the decoder layer.
        changed_decisions: Experts that one of the two would keep and the other drop.
        by_chance: 2.5 and 97.5 % points of that number for two samples of one traffic.
        moved: Whether it is above what chance reaches in one of twenty pairs.
    """

    layer: str
    index: int
    changed_decisions: int
    by_chance: tuple[float, float]
    moved: bool


class ExpertDrift(Record):
    """One expert whose saliency moved.

    Attributes:
        index: Index of the decoder layer.
        expert: Its id.
        before: Saliency in the first statistics.
        after: In the second.
        change: Their difference.
        interval: 95 % interval of the difference.
        tells: `kept` where a new plan would keep it and the old would not, `dropped` the other way round, else None.
    """

    index: int
    expert: int
    before: float
    after: float
    change: float
    interval: tuple[float, float]
    tells: str | None


class SliceDrift(Record):
    """One slice.

    Attributes:
        slice: Its name.
        token_share_before: Share of the tokens in the first statistics; 0 for a new slice.
        token_share_after: In the second; 0 for one that is gone.
        changed_decisions: Over all layers, of plans made from this slice alone; None where one of the two lacks it.
        by_chance: As in `LayerDrift`.
        moved: Whether it is above what chance reaches in one of twenty pairs.
        dropped_gate_mass_before: Share of the gate weight that the first statistics' plan drops, on the first.
        dropped_gate_mass_after: Of the same plan on the second: what serving that plan would cost this slice now.
    """

    slice: str
    token_share_before: float
    token_share_after: float
    changed_decisions: int | None
    by_chance: tuple[float, float] | None
    moved: bool | None
    dropped_gate_mass_before: float | None
    dropped_gate_mass_after: float | None


class Drift(Record):
    """What moved between two statistics.

    Attributes:
        criterion: Name of the criterion.
        keep_experts: Experts kept per layer.
        plan_would_change: Whether all layers together differ by more than chance reaches in one of twenty pairs.
        changed_decisions: Over all layers.
        by_chance: 2.5 and 97.5 % points of that number for two samples of one traffic.
        p_value: Share of such pairs that differ as much, with the observed pair counted in.
        experts_moved: Experts whose saliency moved, at a false discovery rate of 5 %.
        layers: One entry a layer.
        slices: One entry a slice of either.
        experts: Those that moved, the surest first.
    """

    criterion: str
    keep_experts: int
    plan_would_change: bool
    changed_decisions: int
    by_chance: tuple[float, float]
    p_value: float
    experts_moved: int
    layers: tuple[LayerDrift, ...]
    slices: tuple[SliceDrift, ...]
    experts: tuple[ExpertDrift, ...]
