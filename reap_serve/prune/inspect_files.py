"""Whether the files beside the weights are those that were written, by what their bytes mean for what is served."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from reap_serve.architectures.resolve import resolve
from reap_serve.errors import InputFileError, RequestError
from reap_serve.model import ModelSource
from reap_serve.prune.checkpoint import OLD_SIDECAR_NAME, SIDECAR_NAME, SIDECARS, WEIGHT_SUFFIXES, Checkpoint
from reap_serve.prune.compare_bytes import compare_tensors
from reap_serve.prune.compare_config import compare_values
from reap_serve.prune.decide import Decision
from reap_serve.prune.digests import FileDigest, digest_file
from reap_serve.prune.findings import Finding, error, warning
from reap_serve.prune.job import CONFIG_NAME, QUANT_CONFIG_NAMES
from reap_serve.prune.manifest import MANIFEST_NAME, Manifest
from reap_serve.records import JsonValue
from reap_serve.weight_headers import read_shard

# Other bytes here are other tokens, other pixels or other code, and nobody edits them in a finished checkpoint.
FIXED = (
    SIDECAR_NAME,
    *QUANT_CONFIG_NAMES,
    "tokenizer.json",
    "tokenizer.model*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*processor_config.json",
    "config.json",
    "params.json",
    "*.py",
    *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES),
)
# Engines read these too, and users edit them: how a conversation is written out, how answers are drawn.
EDITED = ("chat_template*", "*.jinja", "tokenizer_config.json", "generation_config.json")


def inspect_files(
    directory: Path, manifest: Manifest, config: Mapping[str, JsonValue], *, read_weights: bool
) -> Iterator[tuple[str, Finding]]:
    """Compares the files beside the weights with their digests, and config.json with the values that were written.

    A changed or missing file is an error where engines read it and nobody edits it. Templates and defaults of sampling
    may be edited, and are only named; any file may be missing from what no engine reads.

    Args:
        directory: The checkpoint.
        manifest: Of an output that holds digests of files.
        config: The checkpoint's config.json.
        read_weights: Whether to read weights in folders and the sidecar; else only their size is compared.

    Yields:
        The file's path below the checkpoint, and what is wrong with it.
    """
    expected = manifest.files or {}
    for relative, written in expected.items():
        found = _inspect_file(directory, relative, written, read_weights=read_weights)
        if found is not None:
            yield relative, found
    if manifest.config is not None:
        for finding in compare_values(manifest.config, config):
            yield CONFIG_NAME, finding
    for name in sorted(os.listdir(directory)):
        is_weight = name.endswith(WEIGHT_SUFFIXES)
        is_known = name in expected or name == CONFIG_NAME or name.startswith(".")
        if not is_known and not is_weight and _matches(name, (*FIXED, *EDITED)):
            yield name, warning("files", f"{name} was added since the checkpoint was written, and engines read it")


def _inspect_file(directory: Path, relative: str, written: FileDigest, *, read_weights: bool) -> Finding | None:
    check = "sidecar" if relative == SIDECAR_NAME else "files"
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        return error("manifest", f"{MANIFEST_NAME} names {relative}, which is outside the checkpoint")
    is_fixed = _matches(path.name, FIXED)
    if not os.path.lexists(directory / relative):
        is_read = is_fixed or _matches(path.name, EDITED)
        return (error if is_read else warning)(check, f"{relative}, which was written beside the weights, is missing")
    severity = error if is_fixed else warning
    try:
        size = (directory / relative).stat().st_size
        if size != written.num_bytes:
            return severity(check, f"{relative} has {size} bytes, and had {written.num_bytes} when it was written")
        is_weight = relative.endswith(WEIGHT_SUFFIXES)
        if (read_weights or not is_weight) and digest_file(directory / relative) != written:
            return severity(check, f"{relative} has other bytes than when it was written")
    except OSError as failure:
        return severity(check, f"{relative} cannot be read: {failure.strerror}")
    except InputFileError as failure:
        return severity(check, failure.what)
    return None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def inspect_unnamed(pruned: ModelSource, manifest: Manifest) -> Iterator[Finding]:
    """What can be said of the files where the manifest has no digests of them, and what cannot."""
    yield warning(
        "files",
        "no digest of config.json and of the files beside the weights is known: they were compared with nothing, and "
        "--source compares them",
    )
    planned = manifest.source_fingerprint.top_k
    with contextlib.suppress(RequestError):  # which is a finding already
        top_k = resolve(pruned.config).limits(pruned.config).top_k
        if top_k != planned:
            what = f"chooses {top_k} experts for a token, and {planned} when it was written"
            yield error("config", f"{CONFIG_NAME} {what}")
    if _sidecar(pruned.path) is None:
        yield warning("sidecar", f"there is neither {SIDECAR_NAME} nor {OLD_SIDECAR_NAME}: drift cannot be watched")


def inspect_sidecar(directory: Path) -> Iterator[Finding]:
    """Whether the sidecar, where there is one, can be read."""
    path = _sidecar(directory)
    try:
        if path is not None:
            read_shard(path)
    except InputFileError as failure:
        yield error("sidecar", failure.what)


def compare_sidecar(directory: Path, decisions: Sequence[Decision], source: Checkpoint) -> Iterator[Finding]:
    """Whether the sidecar, where there is one, holds the full routers of the source.

    Args:
        directory: The checkpoint; its sidecar can be read.
        decisions: What the sidecar holds.
        source: The headers of the source.
    """
    path = _sidecar(directory)
    if path is None:
        return
    shard = read_shard(path)
    held = Checkpoint(directory, {path.name: shard}, {tensor.name: tensor for tensor in shard.tensors}, {})
    for finding in compare_tensors(decisions, source, held, jobs=1):
        yield error("sidecar", f"{path.name}: {finding.detail}")


def _sidecar(directory: Path) -> Path | None:
    return next((path for name in SIDECARS if (path := directory / name).exists()), None)
