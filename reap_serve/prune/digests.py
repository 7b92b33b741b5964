"""Digests of tensors and of the files beside them, made while their bytes pass and compared when they are read again.

XXH3 in 64 bits: it finds what disks, networks and editors change, at the speed of memory. It is no signature: whoever
means to deceive can write the manifest anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from reap_serve.errors import InputFileError
from reap_serve.prune.stopping import until_left
from reap_serve.records import Record
from reap_serve.weight_headers import Shard, Tensor, open_regular

BUFFER_BYTES = 1 << 20

# What looks at a tensor's bytes in passing; called with each piece in order.
Witness = Callable[[Tensor, memoryview], None]


class FileDigest(Record):
    """Size and digest of a whole file.

    Attributes:
        num_bytes: Its size.
        digest: XXH3 of 64 bits in hexadecimal.
    """

    num_bytes: int
    digest: str

    @classmethod
    def of(cls, content: bytes) -> FileDigest:
        """Of a file with this content."""
        return cls(num_bytes=len(content), digest=xxhash.xxh3_64_hexdigest(content))


class FileDigester:
    """The digest of a file whose bytes come in pieces of any length."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()
        self._num_bytes = 0

    def update(self, piece: memoryview | bytes) -> None:
        """Takes in the next bytes."""
        self._state.update(piece)
        self._num_bytes += len(piece)

    @property
    def found(self) -> FileDigest:
        """Of the bytes so far."""
        return FileDigest(num_bytes=self._num_bytes, digest=self._state.hexdigest())


class TensorDigests:
    """Digests of tensors whose bytes come one after the other, in pieces of any length.

    Args:
        sizes: Bytes of each tensor, in the order in which they come.
    """

    def __init__(self, sizes: Iterable[tuple[str, int]]) -> None:
        self._sizes = iter(sizes)
        self._name: str | None = None
        self._left = 0
        self._state = xxhash.xxh3_64()
        self.found: dict[str, str] = {}
        self._begin()

    def _begin(self) -> None:
        """Goes on to the next tensor that has bytes."""
        for name, size in self._sizes:
            self._state.reset()
            if size:
                self._name, self._left = name, size
                return
            self.found[name] = self._state.hexdigest()
        self._name = None

    def update(self, piece: memoryview | bytes) -> None:
        """Takes in the next bytes."""
        view = memoryview(piece)
        while view.nbytes:
            assert self._name is not None, "more bytes than the tensors have"
            taken = view[: self._left]
            self._state.update(taken)
            self._left -= taken.nbytes
            view = view[taken.nbytes :]
            if not self._left:
                self.found[self._name] = self._state.hexdigest()
                self._begin()


def digest_files(
    directory: Path,
    shards: Mapping[str, Shard],
    jobs: int,
    advance: Callable[[int], None] = lambda num_bytes: None,
    witness: Witness | None = None,
) -> dict[str, str]:
    """The digest of every tensor of weight files, read once; memory is a buffer a job.

    Args:
        directory: Where the files stand.
        shards: Their headers.
        jobs: Files read at a time.
        advance: Called with the bytes of each step, from several threads.
        witness: Sees every byte, from several threads.

    Raises:
        InputFileError: A file cannot be read or has become shorter.
    """
    found: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="digest") as pool, until_left(advance) as advance:
        for digests in pool.map(lambda shard: _digest_file(directory, shard, advance, witness), shards.values()):
            found.update(digests)
    return found


def _digest_file(
    directory: Path, shard: Shard, advance: Callable[[int], None], witness: Witness | None
) -> dict[str, str]:
    digests = TensorDigests((tensor.name, tensor.num_bytes) for tensor in shard.tensors)
    descriptor = open_regular(directory / shard.name)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for tensor in shard.tensors:
            for piece in _pieces(descriptor, tensor, buffer):
                digests.update(piece)
                if witness is not None:
                    witness(tensor, piece)
                advance(piece.nbytes)
    except OSError as error:
        raise InputFileError(f"{shard.name} cannot be read: {error.strerror}", "check the disk") from None
    finally:
        os.close(descriptor)
    return digests.found


def _pieces(descriptor: int, tensor: Tensor, buffer: memoryview) -> Iterator[memoryview]:
    done = 0
    while done < tensor.num_bytes:
        wanted = min(tensor.num_bytes - done, buffer.nbytes)
        count = os.preadv(descriptor, [buffer[:wanted]], tensor.offset + done)
        if not count:
            raise InputFileError(f"{tensor.file} ended within {tensor.name}", "leave it unchanged while it is read")
        yield buffer[:count]
        done += count


def digest_file(path: Path) -> FileDigest:
    """The digest of a whole file; memory is a buffer.

    Raises:
        InputFileError: It is missing, unreadable, or not a regular file.
    """
    digester = FileDigester()
    descriptor = open_regular(path)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    try:
        while count := os.readv(descriptor, [buffer]):
            digester.update(buffer[:count])
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror}", "check the disk") from None
    finally:
        os.close(descriptor)
    return digester.found
