"""Whether a pruned checkpoint is sound: what stock vLLM would load without complaint and serve wrong is found here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.errors import InputFileError, RequestError
from reap_serve.model import ModelSource, fingerprint, open_model
from reap_serve.plan.record import Plan, read_plan, require_plan_for
from reap_serve.prune.checkpoint import Checkpoint, carried_files, read_checkpoint
from reap_serve.prune.compare_bytes import compare_tensors
from reap_serve.prune.config import QUANTIZATION_KEYS, pruned_config
from reap_serve.prune.decide import MtpChoice, decide, make_cut
from reap_serve.prune.findings import Finding, VerifyReport, error, warning
from reap_serve.prune.inspect import inspect_experts, inspect_index, inspect_modules, inspect_routing
from reap_serve.prune.job import CONFIG_NAME, QUANT_CONFIG_NAME, REWRITTEN
from reap_serve.prune.load_check import check_by_loading
from reap_serve.prune.manifest import MANIFEST_NAME, Manifest, read_manifest
from reap_serve.prune.parallel import expert_shape, inspect_parallel
from reap_serve.records import read_json_object


def verify(
    output: Path,
    source: str | None,
    plan: Path | None,
    *,
    load: bool = False,
    ranks: int = 1,
    jobs: int = 2,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> VerifyReport:
    """Checks a checkpoint by itself and, when its source is given, against every byte that it was made from.

    Args:
        output: The pruned checkpoint.
        source: The model that it was pruned from, None to check it by itself.
        plan: The plan, None to take the one in its manifest.
        load: Whether to start vLLM on both and compare their answers; takes a source.
        ranks: Tensor-parallel ranks that vLLM is to share the experts between; 1 leaves that check out.
        jobs: Pairs of files compared at a time.
        advance: Called with the bytes compared by each step.

    Raises:
        InputFileError: OUTPUT is no directory with a config.json; or source or plan are wrong.
        ArchitectureError: The family is unknown.
    """
    if not output.is_dir():
        raise InputFileError(f"{output} is not a directory", "give the pruned checkpoint")
    pruned = open_model(str(output))
    findings: list[Finding] = []
    try:
        checkpoint = read_checkpoint(output)
        findings.extend(_inspect(pruned, checkpoint, ranks))
    except InputFileError as failure:
        return VerifyReport.of([error("files", failure.what)])
    manifest = None
    if (output / MANIFEST_NAME).exists():
        try:
            manifest = read_manifest(output)
        except InputFileError as failure:
            findings.append(error("manifest", failure.what))
    else:
        findings.append(warning("manifest", f"there is no {MANIFEST_NAME}: was this made by another tool?"))
    if source is not None or plan is not None:
        if source is None:
            raise RequestError("--plan is given without --source", "give both, or the source alone")
        chosen = read_plan(plan) if plan is not None else manifest.plan if manifest is not None else None
        if chosen is None:
            raise RequestError(f"{output} has no {MANIFEST_NAME} to take the plan from", "give --plan")
        original = open_model(source)
        findings.extend(_against_source(pruned, checkpoint, original, chosen, manifest, jobs, advance))
        if load:
            findings.extend(check_by_loading(original.path, output, chosen))
    elif load:
        raise RequestError("--load is given without --source", "give the model that was pruned")
    return VerifyReport.of(findings)


def _inspect(pruned: ModelSource, checkpoint: Checkpoint, ranks: int) -> Iterator[Finding]:
    architecture = resolve(pruned.config)
    try:
        limits = architecture.limits(pruned.config)
    except RequestError as failure:
        yield error("config", failure.what)
        return
    names = TensorNames(architecture, architecture.num_layers(pruned.config))
    yield from inspect_index(checkpoint)
    yield from inspect_routing(limits)
    zero_experts = architecture.zero_experts(pruned.config)
    yield from inspect_experts(checkpoint, architecture, names, limits, zero_experts)
    text = architecture.text_config(pruned.config)
    yield from inspect_modules(text, names, limits.num_experts)
    quantization = [part.get(key) for part in (text, pruned.config) for key in QUANTIZATION_KEYS]
    if (pruned.path / QUANT_CONFIG_NAME).exists():
        quantization.append(read_json_object(pruned.path / QUANT_CONFIG_NAME))
        yield from inspect_modules(quantization[-1], names, limits.num_experts)
    if ranks > 1:
        shape = expert_shape(checkpoint.tensors.values(), names, text, quantization, architecture.expert_hidden_keys)
        yield from inspect_parallel(shape, limits, ranks)


def _against_source(
    pruned: ModelSource,
    checkpoint: Checkpoint,
    source: ModelSource,
    plan: Plan,
    manifest: Manifest | None,
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
    mtp = MtpChoice(manifest.mtp) if manifest is not None and manifest.mtp is not None else MtpChoice.CUT
    names = TensorNames(architecture, architecture.num_layers(source.config))
    cut = make_cut(plan, limits, mtp, architecture.zero_experts(source.config), may_differ=True)
    original = read_checkpoint(source.path)
    decisions, _ = decide(names, cut, original.tensors.values(), architecture.projections)
    expected = pruned_config(source.config, architecture, names, cut)
    for key in sorted(expected.keys() | pruned.config.keys()):
        if expected.get(key) != pruned.config.get(key):
            yield error("config", f"{CONFIG_NAME}: {key} is not what the source and the plan give")
    for relative in carried_files(source.path, REWRITTEN):
        if not (pruned.path / relative).is_file():
            yield warning("files", f"{relative} of the source is missing")
        elif (pruned.path / relative).read_bytes() != (source.path / relative).read_bytes():
            yield warning("files", f"{relative} differs from the source's")
    yield from compare_tensors(decisions, original, checkpoint, jobs, advance)
