"""Writes the files of a job into a directory: whole under their names or not at all, and not twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from reap_serve.errors import StorageError
from reap_serve.prune.checkpoint import Checkpoint
from reap_serve.prune.copy import Copier
from reap_serve.prune.decide import Decision
from reap_serve.prune.digests import BUFFER_BYTES, FileDigest, FileDigester, TensorDigests
from reap_serve.prune.layout import OutputShard, coalesced, extents
from reap_serve.prune.stopping import until_left
from reap_serve.weight_headers import FileState, Shard, open_regular

PARTIAL_SUFFIX = ".partial"

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Written:
    """What became of weight files.

    Attributes:
        bytes_read: Bytes read from the source now; files that an earlier attempt finished are not read again.
        digests: Digest of each tensor, by its name in the output.
    """

    bytes_read: int
    digests: dict[str, str]


def write_shards(
    shards: Sequence[OutputShard], checkpoint: Checkpoint, content: Path, notes: Path, jobs: int, advance: Advance
) -> Written:
    """Writes every weight file that is not there yet, several at a time.

    The digests of a file are noted before it takes its name, so that an attempt that goes on later knows them.

    Args:
        shards: The files.
        checkpoint: The source.
        content: Directory of the output.
        notes: Directory for the digests of each file; made where it is missing.
        jobs: Files at a time.
        advance: Called with the bytes of each step, from several threads.

    Raises:
        StorageError: The disk refused, or a source file changed since its header was read.
    """
    missing = [shard for shard in shards if not is_finished(content, notes, shard)]
    advance(sum(shard.data_bytes for shard in shards) - sum(shard.data_bytes for shard in missing))

    def write(shard: OutputShard, advance: Advance) -> None:
        write_tensors(
            content / shard.name,
            shard.header,
            shard.decisions,
            checkpoint,
            advance,
            lambda digests: write_text(_note(notes, shard.name), json.dumps(digests).encode()),
        )

    notes.mkdir(exist_ok=True)
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="shard") as pool, until_left(advance) as advance:
        futures = [pool.submit(write, shard, advance) for shard in missing]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    digests: dict[str, str] = {}
    for shard in shards:
        digests.update(json.loads(_note(notes, shard.name).read_bytes()))
    return Written(sum(shard.data_bytes for shard in missing), digests)


def _note(notes: Path, name: str) -> Path:
    return notes / f"{name}.json"


def is_finished(content: Path, notes: Path, shard: OutputShard) -> bool:
    """Whether an earlier attempt finished a weight file and noted its digests."""
    path = content / shard.name
    # Only a finished file has this name; the size guards against a disk that lost its end in a power failure.
    return _note(notes, shard.name).is_file() and path.is_file() and path.stat().st_size == shard.num_bytes


def write_tensors(
    path: Path,
    header: bytes,
    decisions: Sequence[Decision],
    checkpoint: Checkpoint,
    advance: Advance,
    finished: Callable[[Mapping[str, str]], None] = lambda digests: None,
    whole: FileDigester | None = None,
) -> None:
    """Writes one safetensors file from runs of bytes of the source.

    Args:
        path: The file.
        header: Its first bytes.
        decisions: Its tensors.
        checkpoint: The source.
        advance: Called with the bytes of each step.
        finished: Called with the digest of each tensor when all bytes are on the disk, before the file has its name.
        whole: Sees every byte of the file, its header too; None where its digest is not wanted.
    """
    digests = TensorDigests((each.name, each.num_bytes) for each in decisions)

    def witness(piece: memoryview | bytes) -> None:
        digests.update(piece)
        if whole is not None:
            whole.update(piece)

    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        destination = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.write(destination, header)
            if whole is not None:
                whole.update(header)
            position = len(header)
            for file, group in _by_file(decisions):
                position = _append(file, group, destination, position, checkpoint, advance, witness)
            os.fsync(destination)
        finally:
            os.close(destination)
        finished(digests.found)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(
            f"{path.name} could not be copied: {error.strerror}", "mend the disk and run again"
        ) from None


def _by_file(decisions: Sequence[Decision]) -> Iterable[tuple[str, list[Decision]]]:
    group: list[Decision] = []
    for decision in decisions:
        if group and group[-1].tensor.file != decision.tensor.file:
            yield group[-1].tensor.file, group
            group = []
        group.append(decision)
    if group:
        yield group[-1].tensor.file, group


def _by_head(decisions: Sequence[Decision]) -> Iterator[tuple[bytes, list[Decision]]]:
    """Tensors that are copied in one go, and the bytes that stand before them and are not the source's."""
    head, group = b"", list[Decision]()
    for decision in decisions:
        if decision.head:
            yield head, group
            head, group = decision.head, []
        group.append(decision)
    yield head, group


def _append(
    file: str,
    decisions: Sequence[Decision],
    destination: int,
    position: int,
    checkpoint: Checkpoint,
    advance: Advance,
    witness: Callable[[memoryview], None],
) -> int:
    shard = checkpoint.shards[file]
    source = open_regular(checkpoint.directory / file)
    try:
        _require_unchanged(source, shard)
        copier = Copier(source, destination, position, witness)
        for head, group in _by_head(decisions):
            copier.write(head)
            for copied in copier.append(coalesced(run for each in group for run in extents(each))):
                advance(copied)
        _require_unchanged(source, shard)
    finally:
        os.close(source)
    return copier.position


def _require_unchanged(source: int, shard: Shard) -> None:
    if FileState.of(source) != shard.state:
        raise StorageError(f"{shard.name} changed while it was read", "leave the source unchanged and run again")


def write_text(path: Path, content: bytes) -> None:
    """Writes a small file; a partial one never has its name."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"{path.name} cannot be written: {error.strerror}", "free space and run again") from None


def carry(source: Path, content: Path, files: Iterable[str]) -> dict[str, FileDigest]:
    """Copies files unchanged, links resolved.

    Returns:
        The digest of each, made while it was copied.
    """
    buffer = memoryview(bytearray(BUFFER_BYTES))
    found: dict[str, FileDigest] = {}
    for relative in files:
        target = content / relative
        digester = FileDigester()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + PARTIAL_SUFFIX)
            with open(source / relative, "rb", buffering=0) as reader, open(partial, "wb") as writer:
                while count := reader.readinto(buffer):
                    digester.update(buffer[:count])
                    writer.write(buffer[:count])
            os.replace(partial, target)
        except OSError as error:
            raise StorageError(f"{relative} cannot be copied: {error.strerror}", "free space and run again") from None
        found[relative] = digester.found
    return found


def remove_partials(content: Path) -> None:
    """Removes what a killed attempt left unfinished."""
    for partial in content.rglob(f"*{PARTIAL_SUFFIX}"):
        partial.unlink()
