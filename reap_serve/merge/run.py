"""Runs a merge: the checkpoint is laid out as that of the dominant experts pruned, then averages take their place."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.errors import RequestError
from reap_serve.merge.average import merge_group
from reap_serve.merge.grouping import Group, group_layers, method_named
from reap_serve.merge.record import MERGE_NAME, SCHEMA_VERSION, MergedExpert, MergedLayer, MergeRecord
from reap_serve.merge.signature import layer_signatures
from reap_serve.merge.weights import Experts, experts_of, read_part, write_part
from reap_serve.model import ModelSource, open_model, require_same_model
from reap_serve.plan.record import SCHEMA_VERSION as PLAN_VERSION
from reap_serve.plan.record import Plan, PlanLayer
from reap_serve.prune.beside import write_beside, write_sidecar
from reap_serve.prune.card import model_card
from reap_serve.prune.checkpoint import SIDECAR_NAME, read_checkpoint
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.digests import FileDigest, digest_files
from reap_serve.prune.job import CARD_NAME, Job, PruneOptions, make_job
from reap_serve.prune.layout import DEFAULT_SHARD_BYTES
from reap_serve.prune.manifest import MANIFEST_NAME
from reap_serve.prune.write import write_shards, write_text
from reap_serve.publish import new_directory, refuse_existing_directory
from reap_serve.records import provenance
from reap_serve.statistics.record import Header, Statistics

ROUTER = "row of each group's dominant expert"


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """What the user asks for.

    Attributes:
        method: Name in `grouping.METHODS`.
        keep_experts: Experts of each layer of the output.
        mix: Weights of slices; empty pools them as observed.
        align: Whether to align hidden units; None as the method does.
    """

    method: str
    keep_experts: int
    mix: Mapping[str, float]
    align: bool | None = None


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge did.

    Attributes:
        output: The directory.
        tensors: Tensors in the output.
        bytes_written: Bytes of weight files.
        seconds: Wall time.
        experts_before: Experts per layer of the source.
        experts_after: Experts per layer of the output.
        experts_averaged: Experts of the output that are the average of several.
    """

    output: Path
    tensors: int
    bytes_written: int
    seconds: float
    experts_before: int
    experts_after: int
    experts_averaged: int


def merge(
    model: str,
    statistics: Statistics,
    output: Path,
    request: MergeRequest,
    *,
    overwrite: bool,
    advance: Callable[[int], None] = lambda layers: None,
) -> MergeResult:
    """Writes a checkpoint of merged experts, of the size of the pruned one.

    Args:
        model: Directory or hub id; bfloat16, float16 or float32.
        statistics: Sums with the optional ones that the method takes.
        output: The directory to make; there whole or not at all.
        request: What the user asks for.
        overwrite: Replace an existing output.
        advance: Called with 1 for each layer that is done.

    Raises:
        RequestError: Model, statistics or count are wrong; nothing was written.
        ArchitectureError: The experts are quantised, or cannot be aligned.
    """
    begun = time.monotonic()
    refuse_existing_directory(output, overwrite)
    source = open_model(model)
    model_print = statistics.header.model
    if model_print.quantization is not None:
        raise RequestError(
            f"{model} is quantised ({model_print.quantization}), which cannot be averaged",
            "merge its bfloat16 or float32 checkpoint",
        )
    layers = group_layers(layer_signatures(statistics, request.mix or None), request.method, request.keep_experts)
    aligns = method_named(request.method).aligns if request.align is None else request.align
    job = _job(source, _plan_of(statistics.header, layers, request.method))
    require_same_model(model_print, job.manifest.source_fingerprint, "the statistics", model)
    experts = _experts(source, job)
    record = _record(statistics.header, layers, request.method, aligns)
    with new_directory(output, overwrite=overwrite) as content:
        files = _write_dominant(job, content)
        _overwrite_groups(job, source, content, experts, layers, aligns, advance)
        digests = digest_files(content, read_checkpoint(content).shards, jobs=2)
        write_text(content / MANIFEST_NAME, job.manifest.with_digests(digests, files).to_bytes())
        (content / MERGE_NAME).write_text(json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
        write_text(content / CARD_NAME, _card(job, source, request.method))
    return MergeResult(
        output,
        job.layout.num_tensors,
        job.layout.num_bytes,
        time.monotonic() - begun,
        model_print.num_experts,
        request.keep_experts,
        sum(len(group.members) > 1 for groups in layers for group in groups),
    )


def _plan_of(header: Header, layers: tuple[tuple[Group, ...], ...], method: str) -> Plan:
    """The plan that keeps the dominant experts."""
    entries = []
    for layer, groups in zip(header.layers, layers, strict=True):
        kept = tuple(group.dominant for group in groups)
        dropped = tuple(sorted(set(range(header.model.num_experts)) - set(kept)))
        entries.append(PlanLayer(layer=layer.name, index=layer.index, kept=kept, dropped=dropped))
    return Plan(schema_version=PLAN_VERSION, model=header.model, criterion=f"merged by {method}", layers=tuple(entries))


def _job(source: ModelSource, plan: Plan) -> Job:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(plan.model_dump_json())
        return make_job(source, path, PruneOptions(MtpChoice.CUT, DEFAULT_SHARD_BYTES, jobs=2))


def _names(source: ModelSource) -> TensorNames:
    architecture = resolve(source.config)
    return TensorNames(architecture, architecture.num_layers(source.config))


def _experts(source: ModelSource, job: Job) -> Experts:
    return experts_of(job.checkpoint.tensors.values(), _names(source), job.manifest.experts_before)


def _write_dominant(job: Job, content: Path) -> dict[str, FileDigest]:
    """Writes the pruned checkpoint of the dominant experts; gives the digests of the files beside its weights."""
    with tempfile.TemporaryDirectory() as notes:
        write_shards(job.layout.shards, job.checkpoint, content, Path(notes), 2, lambda num_bytes: None)
    return {SIDECAR_NAME: write_sidecar(job, content), **write_beside(job, content)}


def _overwrite_groups(
    job: Job,
    source: ModelSource,
    content: Path,
    experts: Experts,
    layers: tuple[tuple[Group, ...], ...],
    aligns: bool,
    advance: Callable[[int], None],
) -> None:
    """Puts each group's average where its dominant expert is."""
    written = experts_of(
        read_checkpoint(content).tensors.values(),
        _names(source),
        job.manifest.experts_after,
    )
    for entry, groups in zip(job.manifest.plan.layers, layers, strict=True):
        for new_id, group in enumerate(groups):
            if len(group.members) == 1:
                continue
            members = [
                {name: read_part(source.path, part) for name, part in experts[entry.index][member].items()}
                for member in group.members
            ]
            merged = merge_group(members, group.weights, group.members.index(group.dominant), aligns)
            for name, values in merged.items():
                write_part(content, written[entry.index][new_id][name], values)
        advance(1)


def _record(header: Header, layers: tuple[tuple[Group, ...], ...], method: str, aligns: bool) -> MergeRecord:
    return MergeRecord(
        schema_version=SCHEMA_VERSION,
        method=method,
        aligned=aligns,
        router=ROUTER,
        source_fingerprint=header.model,
        statistics=tuple(window.id for window in header.windows),
        layers=tuple(
            MergedLayer(
                index=layer.index,
                experts=tuple(
                    MergedExpert(dominant=group.dominant, members=group.members, weights=group.weights)
                    for group in groups
                ),
            )
            for layer, groups in zip(header.layers, layers, strict=True)
        ),
        provenance=provenance(("numpy", "scipy", "safetensors")),
    )


def _card(job: Job, source: ModelSource, method: str) -> bytes:
    """The card of the pruned checkpoint, with the sentences that are not true of this one replaced."""
    head, _, _ = model_card(job.manifest, source).partition("\n# ")
    name = job.manifest.source.rstrip("/").rpartition("/")[2]
    return (
        f"{head}\n# {name}, {job.manifest.experts_after} merged of {job.manifest.experts_before} experts\n\n"
        f"The routed experts of every layer were merged by {method}, as a baseline to compare pruning with. "
        f"`{MERGE_NAME}` names the members of each expert; the router keeps the {ROUTER}.\n"
    ).encode(errors="backslashreplace")
