"""Checkpoint headers and plan to one decision a tensor: keep, drop, rename, or slice. Pure: no byte is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from reap_serve.architectures.groups import sizes_of, smallest_size
from reap_serve.architectures.names import Kind, Role, TensorNames
from reap_serve.architectures.spec import RoutingLimits
from reap_serve.errors import ArchitectureError, InputFileError, PlanError
from reap_serve.plan.record import Plan
from reap_serve.prune.experts import Lack, LayerTensors, require_complete
from reap_serve.prune.router_parts import Rows, rows_of
from reap_serve.prune.unlisted import UnlistedNames
from reap_serve.weight_headers import DTYPE_BITS, Tensor


class Action(Enum):
    """What becomes of a tensor."""

    KEEP = "keep"
    DROP = "drop"
    RENAME = "rename"
    SLICE = "slice"
    STATE = "state"


class MtpChoice(Enum):
    """What becomes of multi-token-prediction layers."""

    CUT = "cut"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one tensor.

    Attributes:
        tensor: The tensor of the source.
        action: What becomes of it.
        name: Its name in the output.
        axis: Axis along which it is sliced.
        rows: Indices kept along that axis, in the order of the output.
        head: Bytes that replace the tensor's first ones: a number of rows that it states.
    """

    tensor: Tensor
    action: Action
    name: str
    axis: int = 0
    rows: tuple[int, ...] = ()
    head: bytes = b""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the output."""
        if self.action is not Action.SLICE:
            return self.tensor.shape
        shape = self.tensor.shape
        return (*shape[: self.axis], len(self.rows), *shape[self.axis + 1 :])

    @property
    def num_bytes(self) -> int:
        """Size in the output."""
        if self.action is not Action.SLICE:
            return self.tensor.num_bytes
        return self.tensor.num_bytes // self.tensor.shape[self.axis] * len(self.rows)


@dataclass(frozen=True, slots=True)
class Cut:
    """Which experts stay, and what the router of the model allows.

    Attributes:
        limits: Of the model before the cut.
        kept: Kept experts by trunk layer, ascending.
        mtp: What becomes of multi-token-prediction layers.
        zero_experts: Router rows after the experts' that stand for no expert; they stay.
    """

    limits: RoutingLimits
    kept: Mapping[int, tuple[int, ...]]
    mtp: MtpChoice
    zero_experts: int = 0

    @property
    def num_kept(self) -> int:
        """Experts per layer after the cut; the largest count where layers differ."""
        return max(len(ids) for ids in self.kept.values())

    @property
    def is_uniform(self) -> bool:
        """Whether every layer keeps the same number."""
        return len({len(ids) for ids in self.kept.values()}) == 1

    def kept_in(self, layer: int, is_mtp: bool) -> tuple[int, ...] | None:
        """Kept experts of a layer, None when it has none by the configuration.

        Nothing was observed of a multi-token-prediction layer: it keeps the ids that the last layer of the trunk keeps.
        The choice moves the acceptance rate of its drafts and no output of the model.
        """
        return self.kept[self.limits.moe_layers[-1]] if is_mtp else self.kept.get(layer)


def make_cut(
    plan: Plan, limits: RoutingLimits, mtp: MtpChoice, zero_experts: int = 0, *, may_differ: bool = False
) -> Cut:
    """The cut of a plan whose layers are those of the model.

    Args:
        plan: The plan.
        limits: Of the model before the cut.
        mtp: What becomes of multi-token-prediction layers.
        zero_experts: Router rows that stand for no expert.
        may_differ: Whether layers may keep different numbers: stock vLLM does not serve that.

    Raises:
        PlanError: Layers keep different numbers of experts, or the router could not choose top-k from what stays.
    """
    kept = plan.kept_by_layer
    counts = sorted({len(ids) for ids in kept.values()})
    if len(counts) > 1 and not may_differ:
        raise PlanError(
            f"the plan keeps between {counts[0]} and {counts[-1]} experts a layer; stock vLLM serves one count",
            "make the plan with --budget uniform, or see --unequal-layers of `prune`",
        )
    if counts[0] < limits.top_k:
        raise PlanError(
            f"the plan keeps {counts[0]} experts a layer, the router chooses {limits.top_k} per token",
            f"keep at least {limits.top_k}",
        )
    if limits.num_groups > 1:
        for index, ids in kept.items():
            _require_equal_groups(index, ids, limits)
    return Cut(limits, kept, mtp, zero_experts)


def _require_equal_groups(index: int, kept: Sequence[int], limits: RoutingLimits) -> None:
    """The router reads its groups as consecutive runs of equal length: unequal ones would be regrouped silently."""
    sizes = sizes_of(kept, limits.num_experts, limits.num_groups)
    if len(set(sizes)) > 1:
        raise PlanError(
            f"layer {index}: the plan keeps {min(sizes)} to {max(sizes)} experts a group; the router needs equal ones",
            f"keep the same number in each of the {limits.num_groups} groups",
        )
    needed = smallest_size(limits.top_k, limits.top_k_groups)
    if sizes[0] < needed:
        raise PlanError(
            f"layer {index}: the plan keeps {sizes[0]} experts a group; the router scores a group by its best two and "
            f"chooses {limits.top_k} experts from {limits.top_k_groups} groups",
            f"keep at least {needed} a group",
        )


def decide(
    names: TensorNames,
    cut: Cut,
    tensors: Iterable[Tensor],
    projections: Sequence[str],
    unlisted: UnlistedNames | None = None,
) -> tuple[tuple[Decision, ...], tuple[Lack, ...]]:
    """One decision a tensor, in their order, and the kept experts that lack a scale which others of their layer have.

    Args:
        names: Of the family.
        cut: Which experts stay.
        tensors: Of the checkpoint.
        projections: Linear maps that experts of their own must have.
        unlisted: Finds what depends on the experts under other names.

    Raises:
        ArchitectureError: The checkpoint holds tensors of router or experts that the family does not describe, or
            layers and shapes differ from the configuration.
        InputFileError: An expert or router is missing, or a kept expert is stored in another form than the others.
    """
    tensors = tuple(tensors)
    _refuse_hqq(tensors, names)
    layers: dict[tuple[bool, int], LayerTensors] = {}
    decisions: list[Decision] = []
    for tensor in tensors:
        role = names.role(tensor.name)
        if role.is_mtp and cut.mtp is MtpChoice.DROP:
            decisions.append(Decision(tensor, Action.DROP, tensor.name))
            continue
        if not role.is_routed:
            _require_independent(tensor, role, cut, unlisted)
            decisions.append(Decision(tensor, Action.KEEP, tensor.name))
            continue
        assert role.layer is not None
        kept = cut.kept_in(role.layer, role.is_mtp)
        if kept is None or role.kind is Kind.UNKNOWN:
            what = "belongs to a layer that config.json calls dense" if kept is None else "is unknown to the family"
            raise ArchitectureError(f"{tensor.name} {what}", "report the checkpoint, or mend its config.json")
        layers.setdefault((role.is_mtp, role.layer), LayerTensors()).add(role, tensor)
        decisions.append(_decide_routed(tensor, role, kept, cut))
    missing = set(cut.kept) - {layer for is_mtp, layer in layers if not is_mtp}
    if missing:
        raise InputFileError(
            f"the checkpoint lacks router and experts of layer {min(missing)} under every name that the family has",
            "download the missing files, or mend the number of layers in config.json",
        )
    lacking: list[Lack] = []
    for (is_mtp, layer), found in sorted(layers.items()):
        stay = cut.kept_in(layer, is_mtp) or ()
        lacking.extend(require_complete(layer, found, cut.limits.num_experts, projections, stay))
    return tuple(decisions), tuple(lacking)


def _refuse_hqq(tensors: Iterable[Tensor], names: TensorNames) -> None:
    found = next(
        (each.name for each in tensors if each.name.endswith(".W_q") and names.role(each.name).is_routed), None
    )
    if found is not None:
        raise ArchitectureError(
            f"{found}: experts and routers quantised by HQQ cannot be pruned, and vLLM does not serve them",
            "prune the model that the checkpoint was quantised from",
        )


def _require_independent(tensor: Tensor, role: Role, cut: Cut, unlisted: UnlistedNames | None) -> None:
    is_dense = role.layer is not None and cut.kept_in(role.layer, role.is_mtp) is None
    if unlisted is None or (found := unlisted.find(tensor, role, 0 if is_dense else cut.limits.num_experts)) is None:
        return
    raise ArchitectureError(found.what, found.remedy)


def _decide_routed(tensor: Tensor, role: Role, kept: tuple[int, ...], cut: Cut) -> Decision:
    num_experts = cut.limits.num_experts
    if role.kind is Kind.EXPERT:
        assert role.expert is not None
        if role.expert not in kept:
            return Decision(tensor, Action.DROP, tensor.name)
        new = kept.index(role.expert)
        action = Action.KEEP if new == role.expert else Action.RENAME
        tail = tensor.name[len(role.prefix) + len(str(role.expert)) :]
        return Decision(tensor, action, f"{role.prefix}{new}{tail}")
    keep = Decision(tensor, Action.KEEP, tensor.name)
    if role.kind is Kind.HASH_TABLE:
        if len(kept) < num_experts:
            raise ArchitectureError(
                f"{tensor.name} routes by a table of token ids: its layer needs every expert",
                "such models cannot be pruned to one count for all layers",
            )
        return keep
    if role.kind is Kind.STACKED and len(tensor.shape) <= role.axis:
        return keep  # a scale that all experts share
    rows = num_experts + (0 if role.kind is Kind.STACKED else cut.zero_experts)
    if role.kind is Kind.ROUTER_PART:
        is_cut = len(kept) < num_experts
        found = rows_of(tensor, role, rows) if is_cut else Rows.ALL
        if found is Rows.STATED:
            stay = len(kept) + rows - num_experts
            return replace(keep, action=Action.STATE, head=_number(stay, tensor))
        if found is Rows.ALL:
            return keep
    if len(tensor.shape) <= role.axis or tensor.shape[role.axis] != rows:
        remedy = "mend config.json or report the checkpoint"
        if role.is_mtp:
            remedy = "leave the draft layers out with --mtp drop, or mend config.json"
        raise ArchitectureError(
            f"{tensor.name} has the shape {list(tensor.shape)}, config.json promises {rows} on axis {role.axis}", remedy
        )
    if len(kept) == num_experts:
        return keep
    if tensor.num_bytes % tensor.shape[role.axis]:
        raise ArchitectureError(
            f"{tensor.name}: an expert of it is not a whole number of bytes", "report the checkpoint"
        )
    return replace(keep, action=Action.SLICE, axis=role.axis, rows=(*kept, *range(num_experts, rows)))


def _number(value: int, tensor: Tensor) -> bytes:
    """A whole number as one element of a tensor."""
    return value.to_bytes(DTYPE_BITS[tensor.dtype] // 8, "little")
