"""Whether each layer has its router and all of its experts, each with the same tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from reap_serve.architectures.names import Kind, Role
from reap_serve.errors import InputFileError
from reap_serve.prune.headers import Tensor

WEIGHT_NAMES = ("weight", "weight_packed", "qweight", "weight_blocks", "blocks")


@dataclass(slots=True)
class LayerTensors:
    """The routed tensors of one layer, gathered name by name.

    Attributes:
        router: Tensors with a row an expert.
        stacked: Tensors that hold all experts.
        suffixes: Names below each expert.
        prefix: Name of the experts' module, for messages.
    """

    router: list[Tensor] = field(default_factory=list)
    stacked: list[Tensor] = field(default_factory=list)
    suffixes: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    prefix: str = ""

    def add(self, role: Role, tensor: Tensor) -> None:
        """Takes in one tensor."""
        if role.kind is Kind.ROUTER:
            self.router.append(tensor)
        elif role.kind is Kind.STACKED:
            self.stacked.append(tensor)
        elif role.expert is not None:
            self.suffixes[role.expert].add(role.suffix)
            self.prefix = role.prefix


@dataclass(frozen=True, slots=True)
class Lack:
    """An expert without a tensor that others of its layer have.

    Attributes:
        expert: Name of the expert.
        index: Its id.
        suffix: Name of the tensor below it.
    """

    expert: str
    index: int
    suffix: str


def is_weight(suffix: str) -> bool:
    """Whether a name below an expert is a weight itself, and not a scale or bias."""
    return suffix.rpartition(".")[2] in WEIGHT_NAMES


def lacks(layer: LayerTensors, num_experts: int) -> tuple[Lack, ...]:
    """Tensors that some expert of the layer has and another has not, in the order of experts."""
    union = set().union(*layer.suffixes.values()) if layer.suffixes else set()
    return tuple(
        Lack(f"{layer.prefix}{expert}", expert, suffix)
        for expert in range(num_experts)
        for suffix in sorted(union - layer.suffixes.get(expert, set()))
    )


def require_complete(index: int, layer: LayerTensors, num_experts: int, projections: Sequence[str]) -> None:
    """Refuses a layer without router or with a missing or surplus expert. Missing scales are allowed here.

    Raises:
        InputFileError: Names the first problem.
    """
    if len(layer.router) != 1:
        raise InputFileError(f"layer {index} has {len(layer.router)} routers", "download the checkpoint again")
    if bool(layer.suffixes) == bool(layer.stacked):
        what = "both stacked experts and experts of their own" if layer.stacked else "no experts"
        raise InputFileError(f"layer {index} has {what}", "download the checkpoint again")
    surplus = sorted(expert for expert in layer.suffixes if expert >= num_experts)
    if surplus:
        raise InputFileError(
            f"layer {index} has expert {surplus[0]}, config.json counts {num_experts}", "mend config.json"
        )
    missing = [lack for lack in lacks(layer, num_experts) if is_weight(lack.suffix)]
    held = {suffix.partition(".")[0] for names in layer.suffixes.values() for suffix in names if is_weight(suffix)}
    absent = [projection for projection in projections if layer.suffixes and projection not in held]
    if absent:
        raise InputFileError(f"layer {index}: no expert has a weight {absent[0]}", "download the checkpoint again")
    if missing:
        raise InputFileError(f"{missing[0].expert} lacks {missing[0].suffix}", "download the checkpoint again")
