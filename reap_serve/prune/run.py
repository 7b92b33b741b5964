"""Runs a pruning: checks everything, then moves bytes, then gives the result its name."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reap_serve.errors import InputFileError, OutputExistsError, StorageError
from reap_serve.model import open_model
from reap_serve.overwriting import require_no_input, require_replaceable_directory
from reap_serve.prune.beside import write_beside, write_sidecar
from reap_serve.prune.card import model_card
from reap_serve.prune.checkpoint import SIDECAR_NAME
from reap_serve.prune.hub import RemoteFiles
from reap_serve.prune.job import CARD_NAME, Job, PruneOptions, make_job
from reap_serve.prune.low_disk import RemoteWeights, open_remote, write_from_hub
from reap_serve.prune.manifest import MANIFEST_NAME
from reap_serve.prune.staging import DIGESTS_NAME, MAX_NAME_BYTES, staged_content, staging_directory
from reap_serve.prune.write import remove_partials, write_shards, write_text
from reap_serve.publish import refuse_existing_directory

SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What a pruning did.

    Attributes:
        output: The directory.
        tensors: Tensors in the output.
        bytes_read: Bytes of tensors read from the source; files finished by an earlier attempt are not read again.
        bytes_written: Bytes of weight files written.
        seconds: Wall time from the first check to the publication.
        experts_before: Experts per layer of the source.
        experts_after: Experts per layer of the output; the largest count where layers differ.
        fewest_after: The smallest count of a layer of the output.
        left_out: Files beside the weights that were not carried, as paths below the source.
    """

    output: Path
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    experts_before: int
    experts_after: int
    fewest_after: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Watcher:
    """How a caller follows the work.

    Attributes:
        started: Called once with the job, before any byte is written.
        advance: Called with the bytes of each step, from several threads.
    """

    started: Callable[[Job], None] = lambda job: None
    advance: Callable[[int], None] = lambda num_bytes: None


def prune(
    model: str,
    plan: Path,
    output: Path,
    options: PruneOptions,
    *,
    overwrite: bool,
    watcher: Watcher | None = None,
    remote: RemoteFiles | None = None,
) -> PruneResult:
    """Writes a checkpoint without the experts that a plan drops.

    The source is only read. OUTPUT appears whole or not at all; after a crash the same command goes on where it was.

    Args:
        model: Directory or hub id.
        plan: The plan.
        output: The directory to make.
        options: What the user chose.
        overwrite: Whether to replace an existing output.
        watcher: Follows the work.
        remote: The model's files on the hub, to fetch and delete weight files one at a time; None to read them from the
            source's directory.

    Raises:
        RequestError: Model, plan or output are wrong; nothing was written.
        StorageError: The disk is full or refused, or the source changed underneath.
    """
    watcher = watcher or Watcher()
    begun = time.monotonic()
    _require_name(output)
    if not overwrite and os.path.lexists(output):
        raise OutputExistsError(f"{output} exists already", "give another path or --overwrite")
    source = open_model(model) if remote is None else open_remote(model, remote)
    _require_apart(source.path, output)
    require_no_input(output, [plan])
    require_replaceable_directory(output)
    job = make_job(source, plan, options, None if remote is None else RemoteWeights(remote))
    model_card(job.manifest, source)
    watcher.started(job)
    refuse_existing_directory(output, overwrite)
    _require_space(job, output, 0 if remote is None else max(remote.weight_files().values()))
    with staging_directory(output, job.digest) as content:
        remove_partials(content)
        manifest = job.manifest
        if remote is None:
            notes = content.parent / DIGESTS_NAME
            written = write_shards(job.layout.shards, job.checkpoint, content, notes, options.jobs, watcher.advance)
            sidecar = write_sidecar(job, content)
        else:
            written, sidecar, weights_sha256 = write_from_hub(job, remote, content, options.jobs, watcher.advance)
            manifest = manifest.with_weights(weights_sha256)
        manifest = manifest.with_digests(written.digests, {SIDECAR_NAME: sidecar, **write_beside(job, content)})
        write_text(content / CARD_NAME, model_card(manifest, source).encode(errors="backslashreplace"))
        write_text(content / MANIFEST_NAME, manifest.to_bytes())
    return PruneResult(
        output=output,
        tensors=job.layout.num_tensors,
        bytes_read=written.bytes_read,
        bytes_written=job.layout.num_bytes,
        seconds=time.monotonic() - begun,
        experts_before=job.manifest.experts_before,
        experts_after=job.manifest.experts_after,
        fewest_after=min(len(layer.kept) for layer in job.manifest.plan.layers),
        left_out=job.companions.left_out,
    )


def _require_name(output: Path) -> None:
    length = len(os.fsencode(output.name))
    if length > MAX_NAME_BYTES:
        raise InputFileError(
            f"the name of OUTPUT has {length} bytes, {MAX_NAME_BYTES} are allowed", "give a shorter name"
        )


def _require_apart(source: Path, output: Path) -> None:
    """The source is never modified: OUTPUT may not be it, lie in it, or hold it."""
    source, output = source.resolve(), output.resolve()
    if output == source or output.is_relative_to(source) or source.is_relative_to(output):
        raise InputFileError(f"OUTPUT {output} overlaps the source {source}", "give a path outside the source")


def _require_space(job: Job, output: Path, download_bytes: int) -> None:
    staged = staged_content(output, job.digest)
    finished = sum(
        shard.num_bytes for shard in job.layout.shards if staged is not None and (staged / shard.name).exists()
    )
    carried = sum((job.source.path / relative).stat().st_size for relative in job.companions.carried)
    sidecar = sum(each.num_bytes for each in job.sidecar)
    needed = job.layout.num_bytes - finished + carried + sidecar + download_bytes + SPARE_BYTES
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise StorageError(
            f"the output needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free beside it",
            "free space and run again",
        )
