"""Prunes a model from the hub without room for it: one weight file at a time is here, and none stays.

What later steps need of a file that is gone is kept in the staging directory: its router rows for the sidecar, and the
samples that the source's fingerprint hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reap_serve.errors import InputFileError, MismatchError, StorageError
from reap_serve.model import Fingerprint, ModelSource, weight_samples
from reap_serve.prune.checkpoint import SIDECAR_NAME, Checkpoint
from reap_serve.prune.digests import FileDigest
from reap_serve.prune.hub import RemoteFiles
from reap_serve.prune.job import CONFIG_NAME, SIDECAR_METADATA, Job
from reap_serve.prune.layout import header_bytes
from reap_serve.prune.staging import DIGESTS_NAME
from reap_serve.prune.write import Written, is_finished, write_shards, write_tensors, write_text
from reap_serve.records import read_json_object
from reap_serve.weight_headers import FileState, Shard, parse_header, read_header, read_shard


def open_remote(reference: str, remote: RemoteFiles) -> ModelSource:
    """The model with its configuration here and its weights on the hub."""
    path = remote.download_rest()
    return ModelSource(reference, path, remote.revision, read_json_object(path / CONFIG_NAME))


@dataclass(frozen=True, slots=True)
class RemoteWeights:
    """Headers of weight files on the hub, read by range.

    Attributes:
        remote: The files.
    """

    remote: RemoteFiles

    def names(self) -> list[str]:
        """Names of the .safetensors files at the top, ascending."""
        return list(self.remote.weight_files())

    def shard(self, name: str) -> Shard:
        """The header of one, checked."""
        size = self.remote.weight_files().get(name)
        if size is None:
            raise InputFileError(f"the index names {name}, which the repository lacks", "check the revision")
        with self.remote.open(name) as handle:
            return parse_header(name, read_header(handle, name, size), FileState(size, 0, 0))


def write_from_hub(
    job: Job, remote: RemoteFiles, content: Path, jobs: int, advance: Callable[[int], None]
) -> tuple[Written, FileDigest, str]:
    """Writes every weight file and the sidecar; each source file is fetched, used and deleted in turn.

    Returns:
        What was written, the digest of the sidecar, and that of the source's weights.

    Raises:
        MismatchError: The weights are not those that the plan was made for.
        StorageError: The disk refused, or a file differs from the header that was read before.
    """
    kept = content.parent / "kept"
    kept.mkdir(exist_ok=True)
    files = remote.weight_files()
    written = Written(0, {})
    for file in files:
        passed = _pass_file(job, remote, file, content, kept, jobs, advance)
        written = Written(written.bytes_read + passed.bytes_read, {**written.digests, **passed.digests})
    digest = hashlib.sha256(b"".join((kept / f"{file}.samples").read_bytes() for file in files)).hexdigest()
    if isinstance(job.manifest.plan.model, Fingerprint) and job.manifest.plan.model.weights_sha256 != digest:
        raise MismatchError(
            f"the plan belongs to other weights ({job.manifest.plan.model.weights_sha256[:12]} against {digest[:12]})",
            "use a plan made for this model",
        )
    routers = b"".join(path.read_bytes() for file in files if (path := kept / f"{file}.routers").exists())
    sidecar = header_bytes(job.sidecar, SIDECAR_METADATA) + routers
    write_text(content / SIDECAR_NAME, sidecar)
    return written, FileDigest.of(sidecar), digest


def _pass_file(
    job: Job, remote: RemoteFiles, file: str, content: Path, kept: Path, jobs: int, advance: Callable[[int], None]
) -> Written:
    shards = [shard for shard in job.layout.shards if shard.source == file]
    routers = [each for each in job.sidecar if each.tensor.file == file]
    samples = kept / f"{file}.samples"
    notes = content.parent / DIGESTS_NAME
    if samples.exists() and all(is_finished(content, notes, shard) for shard in shards):
        return write_shards(shards, job.checkpoint, content, notes, jobs, advance)
    if not shards and not routers:
        with remote.open(file) as handle:
            write_text(samples, weight_samples(handle, file, remote.weight_files()[file]))
        return Written(0, {})
    path = remote.download(file, content.parent / "download")
    here = read_shard(path)
    if here.tensors != job.checkpoint.shards[file].tensors:
        raise StorageError(f"{file} is not the file whose header was read before", "run the command again")
    local = Checkpoint(path.parent, {file: here}, {}, {})
    if routers:
        write_tensors(kept / f"{file}.routers", b"", routers, local, lambda num_bytes: None)
    with path.open("rb") as handle:
        write_text(samples, weight_samples(handle, file, here.state.size))
    written = write_shards(shards, local, content, notes, jobs, advance)
    path.unlink()
    return written
