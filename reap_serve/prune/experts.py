"""Whether each layer has its router and all of its experts, each with the same tensors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from reap_serve.architectures.names import Kind, Role
from reap_serve.errors import InputFileError
from reap_serve.weight_headers import Tensor

WEIGHT_NAMES = ("weight", "weight_packed", "qweight", "weight_blocks", "blocks")
# Storage of an expert's weights: its tensors below it with dtype and shape, without scales.
Form = frozenset[tuple[str, str, tuple[int, ...]]]


@dataclass(slots=True)
class LayerTensors:
    """The routed tensors of one layer, gathered name by name.

    Attributes:
        router: Its weight, under each name that one has.
        stacked: Tensors that hold all experts.
        tensors: Tensors below each expert, by their names below it.
        prefix: Name of the experts' module, for messages.
    """

    router: list[Tensor] = field(default_factory=list)
    stacked: list[Tensor] = field(default_factory=list)
    tensors: defaultdict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    prefix: str = ""

    def add(self, role: Role, tensor: Tensor) -> None:
        """Takes in one tensor."""
        if role.kind is Kind.ROUTER or (role.kind is Kind.ROUTER_PART and is_weight(role.suffix)):
            self.router.append(tensor)
        elif role.kind is Kind.STACKED:
            self.stacked.append(tensor)
        elif role.expert is not None:
            self.tensors[role.expert][role.suffix] = tensor
            self.prefix = role.prefix

    def form(self, expert: int) -> Form:
        """How an expert's weights are stored."""
        held = self.tensors.get(expert, {})
        return frozenset((suffix, each.dtype, each.shape) for suffix, each in held.items() if is_weight(suffix))

    def usual_form(self, preferred: Collection[int] = ()) -> Form:
        """How most experts' weights are stored; where as many are stored in two ways, as most of the preferred are."""
        forms = {expert: self.form(expert) for expert in sorted(self.tensors)}
        votes = Counter(forms.values())
        stay = Counter(form for expert, form in forms.items() if expert in preferred)
        return max(votes, key=lambda form: (votes[form], stay[form], sorted(form))) if votes else frozenset()


@dataclass(frozen=True, slots=True)
class Lack:
    """An expert that is not stored as the others of its layer.

    Attributes:
        expert: Name of the expert.
        index: Its id.
        suffix: The tensor below it that it lacks, or has in another form.
        found: What it has instead, None when it has nothing.
    """

    expert: str
    index: int
    suffix: str
    found: str | None = None

    @property
    def is_scale(self) -> bool:
        """Whether only a scale or its like is missing."""
        return self.found is None and not is_weight(self.suffix)

    @property
    def is_hole(self) -> bool:
        """Whether a weight is missing altogether."""
        return self.found is None and is_weight(self.suffix)

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.expert} lacks {self.suffix}"
        return f"{self.expert} has {self.found} where other experts of its layer have {self.suffix}"


def is_weight(suffix: str) -> bool:
    """Whether a name below an expert is a weight itself, and not a scale or bias."""
    return suffix.rpartition(".")[2] in WEIGHT_NAMES


def lacks(layer: LayerTensors, num_experts: int, preferred: Collection[int] = ()) -> tuple[Lack, ...]:
    """Where experts are not stored as most of their layer are, in the order of experts.

    Args:
        layer: The layer.
        num_experts: Experts that it should have.
        preferred: Experts whose form counts where as many are stored in two ways.
    """
    if not layer.tensors:
        return ()
    usual = layer.usual_form(preferred)
    weights = {suffix: f"{suffix} in {dtype} {list(shape)}" for suffix, dtype, shape in usual}
    usual_experts = [expert for expert in layer.tensors if layer.form(expert) == usual]
    scales = {name for expert in usual_experts for name in layer.tensors[expert] if not is_weight(name)}
    found: list[Lack] = []
    for expert in range(num_experts):
        name, held, form = f"{layer.prefix}{expert}", layer.tensors.get(expert, {}), layer.form(expert)
        odd = {suffix: f"{suffix} in {dtype} {list(shape)}" for suffix, dtype, shape in form - usual}
        for suffix in sorted(weights):
            if suffix in held and suffix not in odd:
                continue
            instead = odd.get(suffix) or next((odd[each] for each in sorted(odd) if _same_map(each, suffix)), None)
            found.append(Lack(name, expert, weights[suffix] if instead else suffix, instead))
        if form == usual:
            found.extend(Lack(name, expert, suffix) for suffix in sorted(scales - held.keys()))
        surplus = sorted(each for each in odd if each not in weights and not any(_same_map(each, w) for w in weights))
        found.extend(Lack(name, expert, "no such tensor", odd[each]) for each in surplus)
    return tuple(found)


def _same_map(left: str, right: str) -> bool:
    """Whether two weights are of one linear map."""
    return left.rpartition(".")[0] == right.rpartition(".")[0]


def require_complete(
    index: int, layer: LayerTensors, num_experts: int, projections: Sequence[str], kept: Collection[int]
) -> tuple[Lack, ...]:
    """Refuses a layer without router, with a missing or surplus expert, or with a kept expert in another form.

    Returns:
        Kept experts that lack a scale which others have: they are written as they are.

    Raises:
        InputFileError: Names the first problem.
    """
    if len(layer.router) != 1:
        raise InputFileError(f"layer {index} has {len(layer.router)} routers", "download the checkpoint again")
    if bool(layer.tensors) == bool(layer.stacked):
        what = "both stacked experts and experts of their own" if layer.stacked else "no experts"
        raise InputFileError(f"layer {index} has {what}", "download the checkpoint again")
    surplus = sorted(expert for expert in layer.tensors if expert >= num_experts)
    if surplus:
        raise InputFileError(
            f"layer {index} has expert {surplus[0]}, config.json counts {num_experts}", "mend config.json"
        )
    found = lacks(layer, num_experts, kept)
    held = {suffix.partition(".")[0] for names in layer.tensors.values() for suffix in names if is_weight(suffix)}
    absent = [projection for projection in projections if layer.tensors and projection not in held]
    if absent:
        others = sorted(held.difference(projections))
        what = f"layer {index}: no expert has a weight {absent[0]}"
        if others:
            remedy = "rename them to those of the family, or report the checkpoint"
            raise InputFileError(f"{what}, only {', '.join(others[:4])}", remedy)
        raise InputFileError(what, "download the checkpoint again")
    holes = [lack for lack in found if lack.is_hole]
    if holes:
        raise InputFileError(str(holes[0]), "download the checkpoint again")
    odd = sorted({lack.index for lack in found if lack.found is not None and lack.index in kept})
    if odd:
        first = next(lack for lack in found if lack.index == odd[0] and lack.found is not None)
        more = f" (and {len(odd) - 1} more experts of layer {index})" if len(odd) > 1 else ""
        raise InputFileError(
            f"{first}{more}: calibration never reached it, and no kernel takes a layer in two forms",
            f"drop expert {odd[0]} of layer {index}, as `reap-serve plan --drop-unsound MODEL` does, or quantise it",
        )
    return tuple(lack for lack in found if lack.is_scale and lack.index in kept)
