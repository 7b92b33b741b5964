"""Everything about one pruning, decided before the first byte is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from reap_serve import __version__
from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.model import Fingerprint, ModelSource, fingerprint
from reap_serve.plan.record import Plan, read_plan, require_plan_for
from reap_serve.prune.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    WeightFiles,
    carried_files,
    read_checkpoint,
    require_inside,
)
from reap_serve.prune.config import clean_modules, module_renamer, pruned_config
from reap_serve.prune.decide import Action, Cut, Decision, MtpChoice, decide, make_cut
from reap_serve.prune.experts import Lack
from reap_serve.prune.layout import Layout, lay_out
from reap_serve.prune.manifest import MANIFEST_NAME, Manifest, ManifestLayer, ParameterCount
from reap_serve.prune.parameters import count_parameters
from reap_serve.records import JsonValue, provenance, read_json_object

CONFIG_NAME = "config.json"
QUANT_CONFIG_NAME = "hf_quant_config.json"
CARD_NAME = "README.md"
# A safetensors file by another name: loaders that read every `*.safetensors`, as vLLM's `runai_streamer` does, would
# load the full routers over the cut ones.
SIDECAR_NAME = "reap_router.sidecar"
OLD_SIDECAR_NAME = "reap_router.safetensors"
SIDECAR_METADATA = {"format": "pt"}
REWRITTEN = frozenset(
    {CONFIG_NAME, QUANT_CONFIG_NAME, INDEX_NAME, CARD_NAME, MANIFEST_NAME, SIDECAR_NAME, OLD_SIDECAR_NAME}
)


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What the user may choose.

    Attributes:
        mtp: What becomes of multi-token-prediction layers.
        shard_bytes: Largest size of a weight file, about.
        jobs: Files copied at a time.
        unequal_layers: Whether layers may keep different numbers of experts, which only a patched vLLM serves.
    """

    mtp: MtpChoice
    shard_bytes: int
    jobs: int
    unequal_layers: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One pruning.

    Attributes:
        source: The model.
        checkpoint: Its headers.
        plan_is_bound: Whether the plan carries the model's fingerprint.
        cut: Which experts stay.
        decisions: One a tensor.
        lacking: Kept experts without a scale that others have.
        layout: The output's weight files.
        sidecar: The full router tensors of the trunk.
        texts: Rewritten files by name.
        carried: Files copied unchanged, as paths below the source.
        manifest: The output's origin.
        digest: Tells whether a staging directory was begun for this very job.
    """

    source: ModelSource
    checkpoint: Checkpoint
    plan_is_bound: bool
    cut: Cut
    decisions: tuple[Decision, ...]
    lacking: tuple[Lack, ...]
    layout: Layout
    sidecar: tuple[Decision, ...]
    texts: Mapping[str, bytes]
    carried: tuple[str, ...]
    manifest: Manifest
    digest: str


def make_job(source: ModelSource, plan_path: Path, options: PruneOptions, files: WeightFiles | None = None) -> Job:
    """Validates model and plan and lays the output out; writes nothing.

    Args:
        source: The model.
        plan_path: The plan.
        options: What the user chose.
        files: The weight files when they are not in the source's directory. Their part of the fingerprint cannot be
            computed yet: the plan's is taken on trust until every file has passed.

    Raises:
        RequestError: Any of the ways in which model or plan can be wrong.
    """
    architecture = resolve(source.config)
    limits = architecture.limits(source.config)
    plan = read_plan(plan_path)
    require_inside(source.path, source.path / CONFIG_NAME)
    checkpoint = read_checkpoint(source.path, files)
    trusted = plan.model.weights_sha256 if isinstance(plan.model, Fingerprint) else ""
    model = fingerprint(source, None if files is None else trusted)
    is_bound = require_plan_for(plan, model, limits.moe_layers)
    names = TensorNames(architecture, architecture.num_layers(source.config))
    zero_experts = architecture.zero_experts(source.config)
    cut = make_cut(plan, limits, options.mtp, zero_experts, may_differ=options.unequal_layers)
    decisions, lacking = decide(names, cut, checkpoint.tensors.values(), architecture.projections)
    layout = lay_out(decisions, checkpoint.shards, options.shard_bytes)
    texts = {
        CONFIG_NAME: _json_bytes(pruned_config(source.config, architecture, names, cut)),
        INDEX_NAME: _json_bytes(layout.index(checkpoint.index_metadata)),
    }
    if (source.path / QUANT_CONFIG_NAME).exists():
        require_inside(source.path, source.path / QUANT_CONFIG_NAME)
        cleaned = clean_modules(read_json_object(source.path / QUANT_CONFIG_NAME), module_renamer(names, cut))
        texts[QUANT_CONFIG_NAME] = _json_bytes(cleaned)
    plan_sha256 = hashlib.sha256(plan_path.read_bytes()).hexdigest()
    manifest = _manifest(source, model, plan, plan_sha256, names, cut, decisions, layout)
    carried = carried_files(source.path, REWRITTEN)
    return Job(
        source=source,
        checkpoint=checkpoint,
        plan_is_bound=is_bound,
        cut=cut,
        decisions=decisions,
        lacking=lacking,
        layout=layout,
        sidecar=_sidecar(names, decisions),
        texts=texts,
        carried=carried,
        manifest=manifest,
        digest=_digest(checkpoint, manifest, options, carried),
    )


def _sidecar(names: TensorNames, decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    roles = ((each, names.role(each.tensor.name)) for each in decisions)
    routers = [each.tensor for each, role in roles if role.kind in (Kind.ROUTER, Kind.SLICED) and not role.is_mtp]
    routers.sort(key=lambda tensor: (tensor.file, tensor.offset))
    return tuple(Decision(tensor, Action.KEEP, tensor.name) for tensor in routers)


def _manifest(
    source: ModelSource,
    model: Fingerprint,
    plan: Plan,
    plan_sha256: str,
    names: TensorNames,
    cut: Cut,
    decisions: tuple[Decision, ...],
    layout: Layout,
) -> Manifest:
    roles = [names.role(each.tensor.name) for each in decisions]
    mtp_layers = {role.layer for role in roles if role.is_mtp and role.is_routed and role.layer is not None}
    has_mtp = any(role.is_mtp for role in roles)
    layers = [ManifestLayer(index=index, old_ids=ids) for index, ids in cut.kept.items()]
    counts = Counter(each.action.value for each in decisions)
    before = count_parameters(
        names, ((each.tensor, each.tensor.shape) for each in decisions), cut.limits.experts_in, model.top_k
    )
    stay = ((each.tensor, each.shape) for each in decisions if each.action is not Action.DROP)
    after = count_parameters(names, stay, lambda layer: len(cut.kept[layer]), model.top_k)
    if has_mtp and cut.mtp is MtpChoice.CUT:
        last = cut.kept[cut.limits.moe_layers[-1]]
        layers.extend(ManifestLayer(index=index, old_ids=last) for index in sorted(mtp_layers) if index not in cut.kept)
    return Manifest(
        schema_version=1,
        source=source.reference,
        source_revision=source.revision,
        source_fingerprint=model,
        plan=plan,
        plan_sha256=plan_sha256,
        mtp=cut.mtp.value if has_mtp else None,
        experts_before=model.num_experts,
        experts_after=cut.num_kept,
        layers=tuple(layers),
        tensors={action.value: counts[action.value] for action in Action},
        parameters_before=ParameterCount(total=before.total, active=before.active),
        parameters_after=ParameterCount(total=after.total, active=after.active),
        weight_files={shard.name: shard.num_bytes for shard in layout.shards},
        provenance=provenance(("huggingface_hub", "safetensors", "pydantic")),
    )


def _digest(checkpoint: Checkpoint, manifest: Manifest, options: PruneOptions, carried: tuple[str, ...]) -> str:
    document = {
        "version": __version__,
        "states": {name: asdict(shard.state) for name, shard in checkpoint.shards.items()},
        "source": manifest.source_fingerprint.model_dump(),
        "plan": manifest.plan_sha256,
        "mtp": options.mtp.value,
        "shard_bytes": options.shard_bytes,
        "carried": carried,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _json_bytes(document: JsonValue) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
