"""Cuts a LoRA adapter of a model by the plan that the model is cut by, so that it fits the pruned checkpoint.

Layouts, as PEFT 0.17 to 0.19 writes them; r is the rank, E the number of experts:

- an expert of its own: `...experts.3.up_proj.lora_A.weight`. It follows its expert to the new number, or goes with it.
- a router: `lora_B` [E, r] has a row an expert; `lora_A` [r, hidden] knows none. Full weights of `modules_to_save` are
  cut as the checkpoint's are.
- experts in one tensor (`target_parameters`): `lora_A` [E * r, in] holds r rows an expert, one expert after the other;
  `lora_B` [out, r * E] holds E columns a rank, one rank after the other (peft/tuners/lora/layer.py, ParamWrapper, and
  vllm/lora/model_manager.py read them so).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reap_serve.architectures.names import Kind, Role, TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.architectures.spec import Architecture
from reap_serve.errors import ArchitectureError, InputFileError
from reap_serve.model import fingerprint, open_model
from reap_serve.plan.record import read_plan, require_layer_names, require_plan_for
from reap_serve.prune.checkpoint import WEIGHT_SUFFIXES, Checkpoint, require_inside
from reap_serve.prune.companions import ADAPTER_CONFIG
from reap_serve.prune.decide import Action, Cut, Decision, MtpChoice, make_cut
from reap_serve.prune.expert_names import ExpertNames
from reap_serve.prune.layout import lay_out
from reap_serve.prune.modules import ModuleCut
from reap_serve.prune.unlisted import UnlistedNames
from reap_serve.prune.write import carry, write_tensors, write_text
from reap_serve.publish import new_directory, refuse_existing_directory
from reap_serve.records import read_json_object, strict_json
from reap_serve.weight_headers import Tensor, read_shard

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The part of a module that a tensor of an adapter is.
PART = re.compile(r"\.(lora_[A-Za-z_]+|ia3_l|hada_\w+|lokr_\w+|oft_\w+|vera_\w+|base_layer)(?=\.|$)")
REPORT = "report the adapter"


@dataclass(frozen=True, slots=True)
class AdapterResult:
    """What became of an adapter.

    Attributes:
        output: The directory, None when the adapter needs no change and nothing was written.
        tensors: Tensors of the output.
        dropped: Tensors that went with their experts.
        bytes_written: Bytes of its weight file.
        seconds: Wall time.
        experts_before: Experts per layer of the model.
        experts_after: Experts per layer after the cut.
    """

    output: Path | None
    tensors: int
    dropped: int
    bytes_written: int
    seconds: float
    experts_before: int
    experts_after: int


def prune_adapter(adapter: Path, model: str, plan_path: Path, output: Path, *, overwrite: bool) -> AdapterResult:
    """Writes an adapter that fits the pruned checkpoint, or says that the one that is there fits.

    Args:
        adapter: Directory of the adapter.
        model: The model that it was trained on, before pruning.
        plan_path: The plan.
        output: The directory to make; there whole or not at all.
        overwrite: Whether to replace an existing output.

    Raises:
        InputFileError: The adapter is incomplete or not in safetensors.
        ArchitectureError: It changes experts or routers in a form that cannot be cut.
        RequestError: Model or plan are wrong.
    """
    begun = time.monotonic()
    refuse_existing_directory(output, overwrite, [adapter, model, plan_path])
    config = read_json_object(adapter / ADAPTER_CONFIG)
    checkpoint = _read(adapter)
    source = open_model(model)
    architecture = resolve(source.config)
    limits = architecture.limits(source.config)
    plan = read_plan(plan_path)
    require_plan_for(plan, fingerprint(source), limits.moe_layers)
    names = TensorNames(architecture, architecture.num_layers(source.config))
    require_layer_names(plan, names)
    cut = make_cut(plan, limits, MtpChoice.CUT, architecture.zero_experts(source.config))
    unlisted = UnlistedNames(architecture, names, source.config)
    cutter = _AdapterCut(architecture, names, cut, unlisted)
    decisions = tuple(cutter.decide(tensor) for tensor in checkpoint.tensors.values())
    modules = ModuleCut(ExpertNames(architecture, names, (), unlisted.of_another_decoder), cut, ADAPTER_CONFIG)
    cleaned = modules.clean(config)
    result = AdapterResult(None, len(decisions), 0, 0, time.monotonic() - begun, limits.num_experts, cut.num_kept)
    if cleaned == config and all(each.action is Action.KEEP for each in decisions):
        return result
    (shard,) = lay_out(decisions, checkpoint.shards, 1 << 62).shards or (None,)
    if shard is None:
        raise InputFileError(f"{adapter}: every expert that the adapter changes is dropped", "serve without it")
    others = [path.name for path in sorted(adapter.iterdir()) if path.is_file() and not path.name.startswith(".")]
    carried = [name for name in others if name != ADAPTER_CONFIG and not name.endswith(WEIGHT_SUFFIXES)]
    with new_directory(output, overwrite=overwrite) as content:
        write_tensors(content / WEIGHTS, shard.header, shard.decisions, checkpoint, lambda num_bytes: None)
        write_text(content / ADAPTER_CONFIG, strict_json(cleaned, indent=2))
        carry(adapter, content, carried)
    dropped = sum(each.action is Action.DROP for each in decisions)
    return replace(
        result,
        output=output,
        tensors=len(decisions) - dropped,
        dropped=dropped,
        bytes_written=shard.num_bytes,
        seconds=time.monotonic() - begun,
    )


def _read(adapter: Path) -> Checkpoint:
    path = adapter / WEIGHTS
    if not path.exists():
        others = sorted(each.name for each in adapter.iterdir() if each.name.startswith("adapter_model"))
        found = f", only {others[0]}" if others else ""
        raise InputFileError(f"{adapter} holds no {WEIGHTS}{found}", "save the adapter as safetensors")
    require_inside(adapter, path)
    shard = read_shard(path)
    return Checkpoint(adapter, {shard.name: shard}, {tensor.name: tensor for tensor in shard.tensors}, {})


class _AdapterCut:
    """What becomes of an adapter's tensors."""

    def __init__(self, architecture: Architecture, names: TensorNames, cut: Cut, unlisted: UnlistedNames) -> None:
        self._names = names
        self._cut = cut
        self._unlisted = unlisted
        self._stacks = frozenset(stacked.rpartition(".")[0] for stacked in architecture.stacked)
        self._stacked = frozenset(architecture.stacked)

    def decide(self, tensor: Tensor) -> Decision:
        """One decision.

        Raises:
            ArchitectureError: The tensor depends on the experts and cannot be cut.
        """
        keep = Decision(tensor, Action.KEEP, tensor.name)
        module, part = _split(tensor.name)
        role = self._names.role(f"{module}.weight" if part else module)
        rest = role.suffix.removesuffix(".weight")
        if role.layer is not None and part and (rest in self._stacks or rest in self._stacked):
            role = replace(role, kind=Kind.STACKED)
        if not role.is_routed:
            if (found := self._unlisted.find(replace(tensor, name=module), role, self._cut.limits.num_experts)) is None:
                return keep
            raise ArchitectureError(f"{tensor.name}: {found.what}", REPORT)
        assert role.layer is not None
        kept = self._cut.kept_in(role.layer, role.is_mtp)
        if kept is None or role.kind is Kind.UNKNOWN:
            raise ArchitectureError(f"{tensor.name} changes experts or a router in a way that is not known", REPORT)
        if role.expert is not None and role.expert >= self._cut.limits.num_experts:
            raise ArchitectureError(
                f"{tensor.name} is of expert {role.expert}, and the model has {self._cut.limits.num_experts}",
                "give the model that the adapter was trained on",
            )
        if role.kind is Kind.EXPERT:
            return self._renumbered(keep, module, role, kept)
        if len(kept) == self._cut.limits.num_experts:
            return keep
        if role.kind is Kind.STACKED and part:
            return self._stack(keep, part, kept)
        return self._rows(keep, part, role, kept)

    def _renumbered(self, keep: Decision, module: str, role: Role, kept: Sequence[int]) -> Decision:
        assert role.expert is not None
        if role.expert not in kept:
            return replace(keep, action=Action.DROP)
        start = keep.name.index(module) + len(role.prefix)
        tail = keep.name[start + len(str(role.expert)) :]
        new = kept.index(role.expert)
        action = Action.KEEP if new == role.expert else Action.RENAME
        return replace(keep, action=action, name=f"{keep.name[:start]}{new}{tail}")

    def _stack(self, keep: Decision, part: str, kept: Sequence[int]) -> Decision:
        shape, num_experts = keep.tensor.shape, self._cut.limits.num_experts
        if len(shape) == 3 and shape[0] == num_experts:
            return replace(keep, action=Action.SLICE, axis=0, rows=tuple(kept))
        axis = {"lora_A": 0, "lora_B": 1}.get(part)
        if axis is None or len(shape) != 2 or shape[axis] % num_experts:
            raise ArchitectureError(f"{keep.name} has the shape {list(shape)}, {num_experts} experts expected", REPORT)
        rank = shape[axis] // num_experts
        if axis == 0:
            rows = tuple(expert * rank + row for expert in kept for row in range(rank))
        else:
            rows = tuple(column * num_experts + expert for column in range(rank) for expert in kept)
        return replace(keep, action=Action.SLICE, axis=axis, rows=rows)

    def _rows(self, keep: Decision, part: str, role: Role, kept: Sequence[int]) -> Decision:
        """A router, or a full tensor of `modules_to_save`."""
        if part == "lora_A":
            return keep
        num_experts = self._cut.limits.num_experts
        rows = num_experts + (0 if role.kind is Kind.STACKED else self._cut.zero_experts)
        shape, axis = keep.tensor.shape, 0 if part else role.axis
        if len(shape) <= axis or shape[axis] != rows:
            raise ArchitectureError(f"{keep.name} has the shape {list(shape)}, {rows} expected on axis {axis}", REPORT)
        return replace(keep, action=Action.SLICE, axis=axis, rows=(*kept, *range(num_experts, rows)))


def _split(name: str) -> tuple[str, str]:
    """The module that a tensor of an adapter changes, and its part of it; empty for a full tensor of the module."""
    body = name.removeprefix(PREFIX)
    body = re.sub(r"\.modules_to_save(\.\w+)?(?=\.(weight|bias)$)", "", body)
    match = PART.search(body)
    if match is None:
        return body, ""
    parts = [part for part in PART.findall(body) if part != "base_layer"]
    return body[: match.start()], parts[0] if parts else "base_layer"
