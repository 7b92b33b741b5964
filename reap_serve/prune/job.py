"""Everything about one pruning, decided before the first byte is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from reap_serve import __version__
from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.architectures.spec import Architecture, RoutingLimits
from reap_serve.errors import ArchitectureError
from reap_serve.model import Fingerprint, ModelSource, fingerprint
from reap_serve.plan.record import Plan, read_plan, require_layer_names, require_plan_for
from reap_serve.prune.checkpoint import (
    INDEX_NAME,
    OLD_SIDECAR_NAME,
    SIDECAR_NAME,
    SIDECAR_VERSION,
    Checkpoint,
    WeightFiles,
    read_checkpoint,
    require_inside,
)
from reap_serve.prune.companions import Companions, companions
from reap_serve.prune.compare_config import config_values
from reap_serve.prune.config import pruned_config
from reap_serve.prune.decide import Action, Cut, Decision, MtpChoice, decide, make_cut
from reap_serve.prune.expert_names import ExpertNames
from reap_serve.prune.experts import Lack
from reap_serve.prune.layout import Layout, lay_out
from reap_serve.prune.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, ManifestLayer, ParameterCount
from reap_serve.prune.modules import ModuleCut
from reap_serve.prune.parameters import count_parameters
from reap_serve.prune.recipe import RECIPE_NAME, is_outdated
from reap_serve.prune.scales import Doubt, doubts, read_small_scales
from reap_serve.prune.unlisted import UnlistedNames
from reap_serve.records import provenance, read_json_object, strict_json
from reap_serve.weight_headers import Tensor

CONFIG_NAME = "config.json"
# Where ModelOpt, GPTQ, AWQ and ExLlamaV3 keep their configuration, beside or in place of the one in config.json.
QUANT_CONFIG_NAMES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
CARD_NAME = "README.md"
# Raised when what lies in a staging directory changes its meaning.
STAGING_VERSION = 2
ROUTERS = (Kind.ROUTER, Kind.ROUTER_PART, Kind.SLICED)
SIDECAR_METADATA = {"format": "pt", "schema_version": str(SIDECAR_VERSION)}
REWRITTEN = frozenset(
    {CONFIG_NAME, *QUANT_CONFIG_NAMES, INDEX_NAME, CARD_NAME, MANIFEST_NAME, SIDECAR_NAME, OLD_SIDECAR_NAME}
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
        doubts: What is wrong with the scales of kept experts, as far as they are small.
        layout: The output's weight files.
        sidecar: The full router tensors of the trunk.
        texts: Rewritten files by name.
        companions: Files beside the weights: those copied unchanged, and those left out.
        manifest: The output's origin.
        digest: Tells whether a staging directory was begun for this very job.
    """

    source: ModelSource
    checkpoint: Checkpoint
    plan_is_bound: bool
    cut: Cut
    decisions: tuple[Decision, ...]
    lacking: tuple[Lack, ...]
    doubts: tuple[Doubt, ...]
    layout: Layout
    sidecar: tuple[Decision, ...]
    texts: Mapping[str, bytes]
    companions: Companions
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
    _require_one_count(limits)
    model = fingerprint(source, None if files is None else trusted)
    is_bound = require_plan_for(plan, model, limits.moe_layers)
    names = TensorNames(architecture, architecture.num_layers(source.config))
    require_layer_names(plan, names)
    unlisted = UnlistedNames(architecture, names, source.config)
    zero_experts = architecture.zero_experts(source.config)
    cut = make_cut(plan, limits, options.mtp, zero_experts, may_differ=options.unequal_layers)
    decisions, lacking = decide(names, cut, checkpoint.tensors.values(), architecture.projections, unlisted)
    layout = lay_out(decisions, checkpoint.shards, options.shard_bytes)
    modules = module_cut(architecture, names, cut, decisions, unlisted)
    config = pruned_config(source.config, architecture, modules)
    texts = {
        CONFIG_NAME: strict_json(config, indent=2),
        INDEX_NAME: strict_json(layout.index(checkpoint.index_metadata), indent=2),
    }
    for name in QUANT_CONFIG_NAMES:
        if (source.path / name).exists():
            require_inside(source.path, source.path / name)
            texts[name] = strict_json(modules.clean(read_json_object(source.path / name)), indent=2)
    plan_sha256 = hashlib.sha256(plan_path.read_bytes()).hexdigest()
    manifest = _manifest(source, model, plan, plan_sha256, names, cut, decisions, layout)
    manifest = manifest.model_copy(update={"config": config_values(config)})
    beside = files_beside(source.path, checkpoint.shards.keys(), names, unlisted, modules)
    return Job(
        source=source,
        checkpoint=checkpoint,
        plan_is_bound=is_bound,
        cut=cut,
        decisions=decisions,
        lacking=lacking,
        doubts=() if files is not None else _doubts(checkpoint, names, architecture, decisions),
        layout=layout,
        sidecar=sidecar_decisions(names, decisions),
        texts=texts,
        companions=beside,
        manifest=manifest,
        digest=_digest(checkpoint, manifest, options, beside.carried),
    )


def _require_one_count(limits: RoutingLimits) -> None:
    """A plan counts the experts of a layer from 0 to the model's count: layers of other counts have no plan."""
    counts = sorted({limits.experts_in(layer) for layer in limits.moe_layers})
    if len(counts) > 1:
        raise ArchitectureError(
            f"the layers of the checkpoint have different counts of experts ({counts[0]} to {counts[-1]}): it was cut "
            "before, and such a checkpoint cannot be cut again",
            "prune the checkpoint that it was made from",
        )


def module_cut(
    architecture: Architecture,
    names: TensorNames,
    cut: Cut,
    decisions: Iterable[Decision],
    unlisted: UnlistedNames,
) -> ModuleCut:
    """What a cut does to the names of modules in configurations."""
    roles = (names.role(each.tensor.name) for each in decisions)
    mtp_layers = {role.layer for role in roles if role.is_mtp and role.is_routed and role.layer is not None}
    return ModuleCut(ExpertNames(architecture, names, mtp_layers, unlisted.of_another_decoder), cut)


def files_beside(
    directory: Path, shards: Collection[str], names: TensorNames, unlisted: UnlistedNames, modules: ModuleCut
) -> Companions:
    """The files beside the weights, sorted by what becomes of them.

    Raises:
        InputFileError: One is a link out of the checkpoint.
    """
    found = companions(directory, REWRITTEN, shards, lambda each: depends(names, unlisted, each, modules.cut))
    if RECIPE_NAME in found.carried and is_outdated(directory / RECIPE_NAME, modules):
        return found.leaving_out(RECIPE_NAME)
    return found


def depends(names: TensorNames, unlisted: UnlistedNames, tensor: Tensor, cut: Cut) -> bool:
    """Whether a tensor beside the checkpoint's own depends on its experts."""
    role = names.role(tensor.name)
    return role.is_routed or unlisted.find(tensor, role, cut.limits.num_experts) is not None


def _doubts(
    checkpoint: Checkpoint, names: TensorNames, architecture: Architecture, decisions: Iterable[Decision]
) -> tuple[Doubt, ...]:
    stay = (each.tensor for each in decisions if each.action is not Action.DROP)
    return tuple(doubts(read_small_scales(checkpoint, stay), names, architecture.projections))


def sidecar_decisions(names: TensorNames, decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """The full router tensors of the trunk, in the order of the source's files."""
    roles = ((each, names.role(each.tensor.name)) for each in decisions)
    routers = [each.tensor for each, role in roles if role.kind in ROUTERS and not role.is_mtp]
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
        schema_version=SCHEMA_VERSION,
        source=source.reference,
        source_revision=source.revision,
        source_fingerprint=model,
        plan=plan,
        plan_sha256=plan_sha256,
        mtp=cut.mtp.value if has_mtp or cut.mtp is MtpChoice.DROP else None,
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
        "staging": STAGING_VERSION,
        "states": {name: asdict(shard.state) for name, shard in checkpoint.shards.items()},
        "source": manifest.source_fingerprint.model_dump(),
        "plan": manifest.plan_sha256,
        "mtp": options.mtp.value,
        "shard_bytes": options.shard_bytes,
        "carried": carried,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
