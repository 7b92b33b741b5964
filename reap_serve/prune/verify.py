"""Whether a pruned checkpoint is sound: what stock vLLM would load without complaint and serve wrong is found here."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.errors import InputFileError, RequestError
from reap_serve.model import ModelSource, fingerprint, open_model
from reap_serve.plan.record import Plan, read_plan, require_layer_names, require_plan_for
from reap_serve.prune.checkpoint import INDEX_NAME, OLD_SIDECAR_NAME, SIDECAR_NAME, Checkpoint, read_checkpoint
from reap_serve.prune.compare_bytes import compare_tensors
from reap_serve.prune.compare_config import CONFIG_NAME, compare_configs
from reap_serve.prune.config import pruned_config
from reap_serve.prune.decide import MtpChoice, decide, make_cut
from reap_serve.prune.digests import digest_files
from reap_serve.prune.expert_names import ExpertNames
from reap_serve.prune.findings import Finding, VerifyReport, error, warning
from reap_serve.prune.inspect import inspect_experts, inspect_index, inspect_routing
from reap_serve.prune.inspect_files import compare_sidecar, inspect_files, inspect_sidecar, inspect_unnamed
from reap_serve.prune.inspect_modules import inspect_modules
from reap_serve.prune.job import QUANT_CONFIG_NAMES, files_beside, module_cut, sidecar_decisions
from reap_serve.prune.load_check import check_by_loading
from reap_serve.prune.manifest import MANIFEST_NAME, Manifest, read_manifest
from reap_serve.prune.modules import QUANTIZATION_KEYS
from reap_serve.prune.parallel import expert_shape, inspect_parallel
from reap_serve.prune.promised import inspect_promises
from reap_serve.prune.scales import ScaleValues, doubts, lacks_input_scales, read_small_scales
from reap_serve.prune.unlisted import UnlistedNames
from reap_serve.records import JsonValue, read_json_object

MANY = 5


def verify(
    output: Path,
    source: str | None,
    plan: Path | None,
    *,
    load: bool = False,
    ranks: int = 1,
    jobs: int = 2,
    read_bytes: bool = True,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> VerifyReport:
    """Checks a checkpoint by itself and, when its source is given, against every byte that it was made from.

    Without its source, every tensor is read and compared with the digest in the manifest; the report says what could
    not be checked.

    Args:
        output: The pruned checkpoint.
        source: The model that it was pruned from, None to check it by itself.
        plan: The plan, None to take the one in its manifest.
        load: Whether to start vLLM on both and compare their answers; takes a source.
        ranks: Tensor-parallel ranks that vLLM is to share the experts between; 1 leaves that check out.
        jobs: Files, or pairs of files, read at a time.
        read_bytes: Whether to read the tensors; the report says so where they were not.
        advance: Called with the bytes compared by each step.

    Raises:
        InputFileError: OUTPUT is no directory with a config.json; or source or plan are wrong.
        ArchitectureError: The family is unknown.
    """
    if not output.is_dir():
        raise InputFileError(f"{output} is not a directory", "give the pruned checkpoint")
    pruned = open_model(str(output))
    if load and source is None:
        raise RequestError("--load is given without --source", "give the model that was pruned")
    findings: list[Finding] = []
    try:
        checkpoint = read_checkpoint(output)
        findings.extend(_inspect(pruned, checkpoint, ranks))
    except InputFileError as failure:
        return VerifyReport.of([error("files", failure.what)])
    findings.extend(_inspect_old_sidecar(output))
    manifest = None
    if (output / MANIFEST_NAME).exists():
        try:
            manifest = read_manifest(output)
        except InputFileError as failure:
            findings.append(error("manifest", failure.what))
    else:
        findings.append(warning("manifest", f"there is no {MANIFEST_NAME}: was this made by another tool?"))
    beside = _inspect_beside(pruned, manifest, is_alone=source is None, read_weights=read_bytes or source is not None)
    values = ScaleValues()
    if source is None and plan is None:
        findings.extend(finding for _, finding in beside)
        findings.extend(_inspect_bytes(checkpoint, manifest, values, jobs, advance, read_bytes=read_bytes))
    else:
        if source is None:
            raise RequestError("--plan is given without --source", "give both, or the source alone")
        chosen = read_plan(plan) if plan is not None else manifest.plan if manifest is not None else None
        if chosen is None:
            raise RequestError(f"{output} has no {MANIFEST_NAME} to take the plan from", "give --plan")
        original = open_model(source)
        # The source says more of config.json than the manifest does.
        findings.extend(finding for name, finding in beside if name != CONFIG_NAME)
        reported = {name for name, _ in beside}
        findings.extend(_against_source(pruned, checkpoint, original, chosen, manifest, reported, jobs, advance))
        values = read_small_scales(checkpoint, checkpoint.tensors.values())
        if load:
            findings.extend(check_by_loading(original.path, output, chosen))
    findings.extend(_inspect_scales(pruned, checkpoint, values))
    return VerifyReport.of(findings)


def _inspect(pruned: ModelSource, checkpoint: Checkpoint, ranks: int) -> Iterator[Finding]:
    architecture = resolve(pruned.config)
    try:
        limits = architecture.limits(pruned.config)
    except RequestError as failure:
        yield error("config", failure.what)
        return
    names = TensorNames(architecture, architecture.num_layers(pruned.config))
    unlisted = UnlistedNames(architecture, names, pruned.config)
    yield from inspect_index(checkpoint)
    yield from inspect_routing(limits)
    zero_experts = architecture.zero_experts(pruned.config)
    yield from inspect_experts(checkpoint, architecture, names, limits, zero_experts, unlisted)
    yield from inspect_promises(pruned.config, architecture, names, checkpoint)
    quantization = _quantization(pruned)
    experts = ExpertNames(architecture, names, is_foreign=unlisted.of_another_decoder)
    for part in quantization:
        yield from inspect_modules(part, experts, limits)
    if ranks > 1:
        text = architecture.text_config(pruned.config)
        shape = expert_shape(checkpoint.tensors.values(), names, text, quantization, architecture.expert_hidden_keys)
        yield from inspect_parallel(shape, limits, ranks)


def _quantization(model: ModelSource) -> list[JsonValue]:
    """Every quantisation configuration of a model, in config.json and beside it."""
    text = resolve(model.config).text_config(model.config)
    parts = [text] if text is model.config else [text, model.config]
    found = [part[key] for part in parts for key in QUANTIZATION_KEYS if key in part]
    return found + [read_json_object(model.path / name) for name in QUANT_CONFIG_NAMES if (model.path / name).exists()]


def _inspect_old_sidecar(output: Path) -> Iterator[Finding]:
    if (output / OLD_SIDECAR_NAME).exists() and (output / INDEX_NAME).exists():
        yield warning(
            "sidecar",
            f"{OLD_SIDECAR_NAME} repeats the routers' names: loaders that read every .safetensors file, as vLLM's "
            "runai_streamer, would load the uncut ones; rename it to end in .sidecar",
        )


def _inspect_beside(
    pruned: ModelSource, manifest: Manifest | None, *, is_alone: bool, read_weights: bool
) -> list[tuple[str, Finding]]:
    """What is wrong with the files beside the weights, each with the file's path."""
    if manifest is None:
        return [(SIDECAR_NAME, finding) for finding in inspect_sidecar(pruned.path)]
    if manifest.files is not None:
        return list(inspect_files(pruned.path, manifest, pruned.config, read_weights=read_weights))
    found = [(SIDECAR_NAME, finding) for finding in inspect_sidecar(pruned.path)]
    return found + [("", finding) for finding in inspect_unnamed(pruned, manifest)] if is_alone else found


def _inspect_bytes(
    checkpoint: Checkpoint,
    manifest: Manifest | None,
    values: ScaleValues,
    jobs: int,
    advance: Callable[[int], None],
    *,
    read_bytes: bool,
) -> Iterator[Finding]:
    """Compares every tensor with its digest, and gathers the values of scales from the same bytes."""
    expected = None if manifest is None else manifest.digests
    if not read_bytes:
        yield warning("bytes", "the bytes of the tensors were not read: only headers and configuration were checked")
        return
    found = digest_files(checkpoint.directory, checkpoint.shards, jobs, advance, values.see)
    if expected is None:
        yield warning(
            "bytes",
            f"no digest of a tensor is known: the bytes of {len(found)} tensors were compared with nothing, and "
            "--source compares them",
        )
        return
    altered = sorted(name for name, digest in found.items() if expected.get(name, digest) != digest)
    for name in altered[:MANY]:
        yield error("bytes", f"{name} has other bytes than when it was written")
    if len(altered) > MANY:
        yield error("bytes", f"{len(altered) - MANY} more tensors have other bytes than when they were written")
    for what, names in (("added", found.keys() - expected), ("removed", expected.keys() - found)):
        if names:
            yield error("bytes", f"{len(names)} tensors were {what} since it was written, {min(names)} first")


def _inspect_scales(model: ModelSource, checkpoint: Checkpoint, values: ScaleValues) -> Iterator[Finding]:
    architecture = resolve(model.config)
    names = TensorNames(architecture, architecture.num_layers(model.config))
    for doubt in doubts(values, names, architecture.projections):
        yield (error if doubt.is_certain else warning)("scales", doubt.what)
    if lacks_input_scales(checkpoint.tensors, _quantization(model)):
        yield error(
            "scales",
            "the configuration quantises activations to 4 bits, and no expert has an input scale: vLLM leaves them "
            "uninitialised",
        )


def _against_source(
    pruned: ModelSource,
    checkpoint: Checkpoint,
    source: ModelSource,
    plan: Plan,
    manifest: Manifest | None,
    reported: Collection[str],
    jobs: int,
    advance: Callable[[int], None],
) -> Iterator[Finding]:
    architecture = resolve(source.config)
    limits = architecture.limits(source.config)
    model = fingerprint(source)
    require_plan_for(plan, model, limits.moe_layers)
    if manifest is not None and manifest.source_fingerprint != model:
        yield error("manifest", f"{MANIFEST_NAME} names another source than {source.reference}")
    if manifest is not None and manifest.plan != plan:
        yield warning("manifest", f"{MANIFEST_NAME} holds another plan than the one given")
    names = TensorNames(architecture, architecture.num_layers(source.config))
    require_layer_names(plan, names)
    unlisted = UnlistedNames(architecture, names, source.config)
    mtp = _mtp_choice(pruned, source, manifest)
    cut = make_cut(plan, limits, mtp, architecture.zero_experts(source.config), may_differ=True)
    original = read_checkpoint(source.path)
    decisions, _ = decide(names, cut, original.tensors.values(), architecture.projections, unlisted)
    modules = module_cut(architecture, names, cut, decisions, unlisted)
    yield from compare_configs(pruned_config(source.config, architecture, modules), pruned.config)
    for relative in files_beside(source.path, original.shards, names, unlisted, modules).carried:
        if relative in reported:
            continue
        yield from _compare_file(source.path, pruned.path, relative)
    if SIDECAR_NAME not in reported:
        yield from compare_sidecar(pruned.path, sidecar_decisions(names, decisions), original)
    yield from compare_tensors(decisions, original, checkpoint, jobs, advance)


def _mtp_choice(pruned: ModelSource, source: ModelSource, manifest: Manifest | None) -> MtpChoice:
    """What became of the draft layers; manifests of 0.1 do not say so where the source had none of their tensors."""
    if manifest is not None and manifest.mtp is not None:
        return MtpChoice(manifest.mtp)
    architecture = resolve(source.config)
    keys = () if architecture.mtp is None else architecture.mtp.count_keys
    before, after = architecture.text_config(source.config), architecture.text_config(pruned.config)
    return MtpChoice.DROP if any(before.get(key) and after.get(key) == 0 for key in keys) else MtpChoice.CUT


def _compare_file(source: Path, pruned: Path, relative: str) -> Iterator[Finding]:
    if not (pruned / relative).is_file():
        yield warning("files", f"{relative} of the source is missing")
        return
    try:
        same = filecmp.cmp(source / relative, pruned / relative, shallow=False)
    except OSError as failure:
        yield warning("files", f"{relative} was not compared: {failure.filename} cannot be read: {failure.strerror}")
        return
    if not same:
        yield warning("files", f"{relative} differs from the source's")
