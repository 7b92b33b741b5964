"""Reads the headers of a safetensors checkpoint and nothing else of it, and trusts none of what they say.

Format: 8 bytes little-endian header length, a JSON object `{name: {dtype, shape, data_offsets}}`, then the data, where
each tensor's bytes stand at its offsets without gaps or overlaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

from reap_serve.errors import InputFileError
from reap_serve.records import JsonValue

MAX_HEADER_BYTES = 512 << 20
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 32
LFS_POINTER = b"version "

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name.
        file: Name of the file that holds it.
        dtype: safetensors' name of the dtype.
        shape: Its shape.
        offset: First byte, counted from the beginning of the file.
        num_bytes: Its size.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells that a file changed while it was read.

    Attributes:
        size: Bytes.
        modified_ns: Time of the last change, nanoseconds.
        inode: Number of the file on its disk.
    """

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, descriptor: int) -> FileState:
        """The state of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file.

    Attributes:
        name: Its name.
        state: Its state when the header was read.
        metadata: The header's free text.
        tensors: In the order of their offsets.
    """

    name: str
    state: FileState
    metadata: Mapping[str, str]
    tensors: tuple[Tensor, ...]


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file.

    Raises:
        InputFileError: It is missing, unreadable, or not a regular file.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror}", "give a complete checkpoint") from None
    except ValueError:
        # An index may name anything: a NUL, half a surrogate pair.
        raise InputFileError(f"{path} cannot be the name of a file", "download its index again") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputFileError(f"{path} is not a regular file", "give a complete checkpoint")
    return descriptor


def read_shard(path: Path) -> Shard:
    """The header of one weight file, checked.

    Raises:
        InputFileError: The file is truncated, or its header lies about lengths, offsets, shapes or names.
    """
    with os.fdopen(open_regular(path), "rb") as handle:
        try:
            state = FileState.of(handle.fileno())
            header = read_header(handle, str(path), state.size)
        except OSError as error:
            raise InputFileError(f"{path} cannot be read: {error.strerror}", "check the disk") from None
    return parse_header(path.name, header, state)


def read_header(handle: BinaryIO, path: str, size: int) -> bytes:
    """The JSON text of a header, from a file or what is read as one.

    Args:
        handle: At its first byte.
        path: How to call it in an error.
        size: Bytes of the file.

    Raises:
        InputFileError: It is truncated, or does not hold the header that it announces.
    """
    prefix, length, header = read_beginning(handle, min(size - 8, MAX_HEADER_BYTES))
    if prefix == LFS_POINTER:
        raise InputFileError(f"{path} is a pointer of Git LFS and not the file itself", "run `git lfs pull` there")
    if header is None:
        raise InputFileError(
            f"{path} is truncated or not safetensors: {size} bytes, header of {length} bytes", "download it again"
        )
    if len(header) < length:
        raise InputFileError(f"{path} ended within its header", "download it again")
    return header


def read_beginning(handle: BinaryIO, most: int) -> tuple[bytes, int, bytes | None]:
    """The first bytes of a safetensors file, the length that they announce, and the text of that length behind them.

    The text is None, and left unread, where that is longer than `most` bytes or the file has no 8 bytes; it may be
    shorter than announced.
    """
    prefix = handle.read(8)
    length = int.from_bytes(prefix, "little")
    return prefix, length, handle.read(length) if len(prefix) == 8 and length <= most else None


def parse_header(file: str, header: bytes, state: FileState) -> Shard:
    """The tensors that a header describes.

    Args:
        file: Name of the file, for errors and for `Tensor.file`.
        header: The JSON text.
        state: State of the file; its size bounds the offsets.

    Raises:
        InputFileError: The header is not JSON of the expected form or does not describe the file's bytes exactly.
    """
    try:
        document = json.loads(header, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _lie(file, f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise _lie(file, "not a JSON object")
    metadata = document.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _lie(file, "__metadata__ is not a map of texts")
    data_start = 8 + len(header)
    tensors = sorted(
        (_parse_tensor(file, name, entry, data_start) for name, entry in document.items()),
        key=lambda tensor: (tensor.offset, tensor.num_bytes),
    )
    expected = data_start
    for tensor in tensors:
        if tensor.offset != expected:
            kind = "overlaps the tensor before it" if tensor.offset < expected else "leaves a gap before it"
            raise _lie(file, f"{tensor.name} {kind} (byte {tensor.offset}, expected {expected})")
        expected = tensor.offset + tensor.num_bytes
    if expected != state.size:
        raise InputFileError(
            f"{file} is truncated or padded: its header describes {expected} bytes, it has {state.size}",
            "download it again",
        )
    return Shard(file, state, metadata, tuple(tensors))


def _parse_tensor(file: str, name: str, entry: JsonValue, data_start: int) -> Tensor:
    check_tensor_name(file, name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _lie(file, f"{name} has other fields than dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _lie(file, f"{name} has the unknown dtype {str(dtype)[:80]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(size) for size in shape):
        raise _lie(file, f"{name} has the shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(end) for end in offsets):
        raise _lie(file, f"{name} has the offsets {str(offsets)[:80]}")
    begin, end = offsets
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if num_bits != (end - begin) * 8:
        raise _lie(file, f"{name}: {dtype} {shape} takes {num_bits} bits, its offsets {(end - begin) * 8}")
    return Tensor(name, file, dtype, tuple(shape), data_start + begin, end - begin)


def _is_size(value: JsonValue) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_tensor_name(file: str, name: str) -> None:
    """Refuses names that could leave a directory or a terminal line.

    Raises:
        InputFileError: The name is empty, too long, or holds a separator, `..` or an unprintable character.
    """
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable() or "/" in name or "\\" in name or ".." in name:
        raise _lie(file, f"the tensor name {name[:80]!r} is not allowed")


def _without_duplicates(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _lie(file: str, what: str) -> InputFileError:
    return InputFileError(f"{file}: header: {what}", "download the checkpoint again")
