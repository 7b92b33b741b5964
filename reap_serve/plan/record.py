"""The plan: which experts of each layer stay. Written by `plan` or by hand."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from reap_serve.architectures.names import TensorNames
from reap_serve.errors import MismatchError, PlanError
from reap_serve.model import Fingerprint, require_same_model
from reap_serve.records import FileRecord, JsonValue, Record, read_record

SCHEMA_VERSION = 1
NUMBERED_LAYER = re.compile(r"[Ll]ayer[ _]?(\d{1,6})")


class PlanLayer(Record):
    """One layer's decision.

    Both lists are written, though each follows from the other and the number of experts: a reader of the file needs
    neither the model nor this program, and lists by hand that contradict each other are found.

    Attributes:
        layer: Name, for people; `index` joins it to the checkpoint.
        index: Index of the decoder layer.
        kept: Experts that stay, ascending.
        dropped: Experts that go, ascending.
        saliency: The criterion's value for every expert, in the order of their ids; empty in a hand-written plan.
    """

    layer: str
    index: int
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    saliency: tuple[float | None, ...] = ()

    @property
    def num_experts(self) -> int:
        """Experts of the layer before pruning."""
        return len(self.kept) + len(self.dropped)


class Unbound(Record):
    """`"model": {}`: the plan is bound to no fingerprint."""


class Plan(FileRecord):
    """A pruning plan.

    Attributes:
        model: Fingerprint of the model it is for, or empty.
        criterion: Name of the criterion, free text in a hand-written plan.
        provenance: What made it.
        summary: What the planner predicted; not read by later stages.
        layers: One entry a layer with routed experts, in ascending order of index.
    """

    model: Fingerprint | Unbound
    criterion: str
    provenance: dict[str, JsonValue] = {}
    summary: dict[str, JsonValue] = {}
    layers: tuple[PlanLayer, ...] = Field(min_length=1)

    @property
    def kept_by_layer(self) -> dict[int, tuple[int, ...]]:
        """Experts that stay, ascending, by index of the decoder layer."""
        return {layer.index: layer.kept for layer in self.layers}

    @property
    def num_kept(self) -> int:
        """Experts per layer that stay; the largest count where layers differ."""
        return max(len(layer.kept) for layer in self.layers)


def read_plan(path: Path) -> Plan:
    """The plan in a file, with each layer's kept and dropped experts checked to be disjoint, ascending and complete.

    Raises:
        InputFileError: It is not a plan.
        PlanError: A layer's lists contradict each other.
    """
    plan = read_record(path, Plan, "plan")
    require_ordered(plan, str(path))
    return plan


def require_ordered(plan: Plan, source: str) -> None:
    """Refuses a plan whose lists contradict each other.

    Args:
        plan: The plan.
        source: Where it comes from, for the error.

    Raises:
        PlanError: A layer's kept and dropped experts are not disjoint, ascending and complete, or layers not in order.
    """
    for layer in plan.layers:
        ids = sorted((*layer.kept, *layer.dropped))
        if list(layer.kept) != sorted(layer.kept) or ids != list(range(len(ids))) or not layer.kept:
            raise PlanError(
                f"{source}: layer {layer.index}: kept and dropped are not ascending, disjoint and together 0..E-1 "
                "with kept not empty",
                "mend the lists",
            )
    indices = [layer.index for layer in plan.layers]
    if indices != sorted(set(indices)):
        raise PlanError(f"{source}: layers are not in ascending order of index", "sort them and remove duplicates")


def require_plan_for(plan: Plan, model: Fingerprint, moe_layers: tuple[int, ...]) -> bool:
    """Refuses a plan that does not fit a model.

    Returns:
        False when the plan is bound to no fingerprint and only layers and counts were compared.

    Raises:
        MismatchError: Another model's fingerprint, other layers, or another number of experts.
    """
    if isinstance(plan.model, Fingerprint):
        require_same_model(plan.model, model, "the plan", "the model")
    indices = tuple(layer.index for layer in plan.layers)
    if indices != moe_layers:
        raise MismatchError(
            f"the plan names {len(indices)} layers ({indices[0]}..{indices[-1]}), the model has {len(moe_layers)} with "
            f"routed experts ({moe_layers[0]}..{moe_layers[-1]})",
            "use a plan made for this model",
        )
    for layer in plan.layers:
        if layer.num_experts != model.num_experts:
            raise MismatchError(
                f"the plan's layer {layer.index} counts {layer.num_experts} experts, the model {model.num_experts}",
                "use a plan made for this model",
            )
    return isinstance(plan.model, Fingerprint)


def require_layer_names(plan: Plan, names: TensorNames) -> None:
    """Refuses a plan that calls its layers otherwise than the model does: its indices may be right by chance.

    A plan by hand may call its layers by their number, as in `layer 3`.

    Raises:
        MismatchError: A name is none of the model's layer with that index.
    """
    for layer in plan.layers:
        numbered = NUMBERED_LAYER.fullmatch(layer.layer)
        is_number = numbered is not None and int(numbered[1]) == layer.index
        if not is_number and not names.is_layer(layer.layer, layer.index):
            raise MismatchError(
                f"the plan calls its layer of index {layer.index} {layer.layer[:120]!r}, the model calls none there so",
                "use a plan made for this model, or mend the name",
            )
