"""What can be said of a checkpoint from its own headers and configuration, without its source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from reap_serve.architectures.groups import smallest_size
from reap_serve.architectures.names import Kind, Role, TensorNames
from reap_serve.architectures.spec import Architecture, RoutingLimits
from reap_serve.errors import ArchitectureError
from reap_serve.prune.checkpoint import INDEX_NAME, Checkpoint
from reap_serve.prune.experts import LayerTensors, is_weight, lacks
from reap_serve.prune.findings import Finding, error, warning
from reap_serve.prune.router_parts import Rows, holds_packed, rows_of, stated_rows
from reap_serve.prune.unlisted import UnlistedNames
from reap_serve.records import read_json_object
from reap_serve.weight_headers import Tensor


def inspect_index(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Whether the index names every tensor and states the right size."""
    path = checkpoint.directory / INDEX_NAME
    if not path.exists():
        if len(checkpoint.shards) > 1:
            yield error("index", f"{len(checkpoint.shards)} weight files without {INDEX_NAME}")
        return
    document = read_json_object(path)
    weight_map, metadata = document["weight_map"], document.get("metadata")
    assert isinstance(weight_map, Mapping)
    unnamed = [name for name in checkpoint.tensors if name not in weight_map]
    if unnamed:
        yield error("index", f"{len(unnamed)} tensors are not in {INDEX_NAME}, {unnamed[0]} first")
    stated = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    if stated != total:
        yield error("total_size", f"{INDEX_NAME} states {stated} bytes, the tensors have {total}")


def inspect_routing(limits: RoutingLimits) -> Iterator[Finding]:
    """Whether vLLM would route with these numbers as the configuration says."""
    per_group = limits.num_experts // limits.num_groups
    if limits.num_groups > 1 and per_group < smallest_size(limits.top_k, limits.top_k_groups):
        yield error(
            "groups",
            f"{limits.num_experts} experts in {limits.num_groups} groups: top-{limits.top_k} of "
            f"{limits.top_k_groups} groups cannot be chosen",
        )
    counts = [limits.experts_in(layer) for layer in limits.moe_layers]
    if min(counts) < max(counts):
        yield warning(
            "unequal", f"layers have {min(counts)} to {max(counts)} experts: vLLM needs the patch for it in `patches/`"
        )
    elif limits.num_experts % 2:
        yield warning(
            "parallel", f"{limits.num_experts} experts are divided by no even number of expert-parallel ranks"
        )


def inspect_experts(
    checkpoint: Checkpoint,
    architecture: Architecture,
    names: TensorNames,
    limits: RoutingLimits,
    zero_experts: int,
    unlisted: UnlistedNames,
) -> Iterator[Finding]:
    """Whether each layer has its router and all of its experts, and nothing more: vLLM does not notice."""
    layers: defaultdict[int, LayerTensors] = defaultdict(LayerTensors)
    shapes: defaultdict[tuple[int, str], set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    for tensor in checkpoint.tensors.values():
        role = names.role(tensor.name)
        if not role.is_routed or role.layer is None:
            is_dense = role.layer is not None and not role.is_mtp and role.layer not in limits.moe_layers
            rows = 0 if is_dense else limits.num_experts if role.layer is None else limits.experts_in(role.layer)
            if (found := unlisted.find(tensor, role, rows, is_cut=True)) is not None:
                yield error("names", found.what)
            continue
        if role.kind is Kind.UNKNOWN:
            yield error("names", f"{tensor.name} is unknown to the family {architecture.model_type}")
        elif not role.is_mtp and role.layer not in limits.moe_layers:
            yield error("layers", f"{tensor.name} stands in a layer that config.json calls dense")
        else:
            key = role.layer + (1_000_000 if role.is_mtp else 0)
            layers[key].add(role, tensor)
            if role.kind is Kind.EXPERT:
                shapes[key, role.suffix].add((tensor.dtype, tensor.shape))
            rows = limits.experts_in(role.layer) + (0 if role.kind is Kind.STACKED else zero_experts)
            yield from _inspect_axis(checkpoint.directory, tensor, role, rows)
    for (_, suffix), forms in shapes.items():
        if len(forms) > 1:
            yield error("shapes", f"{suffix} differs between the experts of a layer: {sorted(forms)[:2]}")
    for layer in sorted({*limits.moe_layers, *layers}):
        yield from _inspect_layer(layer, layers[layer], limits.experts_in(layer), architecture.projections)


def _inspect_axis(directory: Path, tensor: Tensor, role: Role, rows: int) -> Iterator[Finding]:
    if role.kind is Kind.ROUTER_PART:
        try:
            if rows_of(tensor, role, rows) is Rows.STATED and (stated := stated_rows(directory, tensor)) != rows:
                yield error("rows", f"{tensor.name} states {stated} rows, {rows} expected")
        except ArchitectureError as failure:
            # Experts that share a number cannot be cut; all of them together are sound.
            if (holds := holds_packed(tensor, rows)) is False:
                yield error("rows", f"{tensor.name} has the shape {list(tensor.shape)}, which packs no {rows} experts")
            elif holds is None:
                yield error("rows", failure.what)
    if role.kind not in (Kind.ROUTER, Kind.SLICED, Kind.STACKED):
        return
    is_shared_scale = role.kind is Kind.STACKED and len(tensor.shape) <= role.axis
    if not is_shared_scale and (len(tensor.shape) <= role.axis or tensor.shape[role.axis] != rows):
        yield error("rows", f"{tensor.name} has the shape {list(tensor.shape)}, {rows} expected on axis {role.axis}")


def _inspect_layer(index: int, layer: LayerTensors, num_experts: int, projections: Sequence[str]) -> Iterator[Finding]:
    if len(layer.router) != 1:
        yield error("router", f"layer {index} has {len(layer.router)} routers")
    if not layer.tensors:
        if not layer.stacked:
            yield error("experts", f"layer {index} has no experts")
        return
    for expert in sorted(layer.tensors):
        if expert >= num_experts:
            yield error("surplus", f"{layer.prefix}{expert} is one more than the {num_experts} of config.json")
    for lack in lacks(layer, num_experts):
        if lack.found is not None:
            yield error("form", f"{lack}: no kernel takes a layer in two forms")
        else:
            check = "scales" if lack.is_scale else "missing"
            yield error(check, f"{lack}: vLLM leaves it uninitialised")
    held = {suffix.partition(".")[0] for found in layer.tensors.values() for suffix in found if is_weight(suffix)}
    for projection in projections:
        if projection not in held:
            yield error("missing", f"layer {index}: no expert has a weight {projection}")
