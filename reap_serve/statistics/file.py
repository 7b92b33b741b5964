"""Writes and reads the statistics file: one safetensors file with a versioned header (see `layout`).

Each tensor is stored in the narrowest dtype that holds its values exactly, so reading gives back the written values.
The checksum finds flipped bits and lost pages at the speed of memory; it is no signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from reap_serve.errors import RequestError
from reap_serve.statistics.layout import (
    BATCHES,
    COUNT_DTYPES,
    FLOAT_DTYPES,
    FORMAT,
    Block,
    Layout,
    corrupt,
    read_layout,
    require_unchanged,
    tensor_name,
)
from reap_serve.statistics.record import (
    BATCH_FIELDS,
    PHASES,
    SCHEMA_VERSION,
    Floats,
    Ints,
    Statistics,
    is_count,
    zeros,
)
from reap_serve.statistics.storage import open_source, write_whole

CHECKSUM_MODULUS = 2**64


def write_statistics(statistics: Statistics, path: str, *, overwrite: bool) -> None:
    """Writes statistics to a local path or an fsspec URL, whole or not at all.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        RequestError: There is no token in the statistics, and nothing was lost either.
        StorageError: The disk or the store refused.
    """
    write_whole(path, encode(statistics), overwrite=overwrite)


def read_statistics(path: str) -> Statistics:
    """The statistics in a file at a local path or an fsspec URL.

    The header's claims are held against the size, and the tensors against the checksum, before the sums are allocated:
    a file that is refused takes no more memory than its size.

    Raises:
        InputFileError: It is missing, unreadable, corrupt, truncated, no statistics, or of another version.
    """
    with open_source(path) as (handle, size):
        layout = read_layout(handle, size, path)
        for _ in read_blocks(handle, layout, path):
            pass
        handle.seek(layout.header_bytes)
        num_slices = len(layout.header.slices)
        aged = layout.header.ageing is not None
        arrays = {
            field: zeros(field, (num_slices, len(PHASES), *shape), aged=aged) for field, shape in layout.shapes.items()
        }
        if layout.has_batches:
            shape = (num_slices, len(layout.header.layers), layout.header.model.num_experts)
            arrays |= {field: zeros(field, shape, aged=aged) for field in BATCH_FIELDS}
        for block, values in read_blocks(handle, layout, path):
            place = (block.slice_index,) if block.phase_index is None else (block.slice_index, block.phase_index)
            arrays[block.field][place] = values
    return Statistics.from_fields(layout.header, arrays)


def encode(statistics: Statistics) -> bytes:
    """The bytes of a statistics file; slices without tokens are left out.

    Raises:
        RequestError: There is no token in the statistics.
    """
    from safetensors.numpy import save

    header = statistics.header
    is_empty = not (statistics.layer_token_count_SPL.any() or statistics.sums.token_count_SPLE.any())
    if is_empty and all(window.complete for window in header.windows):
        raise RequestError("the statistics hold no token", "observe traffic first")
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    written: list[str] = []
    for s, slice_name in enumerate(header.slices):
        for p, phase in enumerate(PHASES):
            # An expert-parallel rank other than the first counts experts' tokens but no layer's.
            has_tokens = statistics.layer_token_count_SPL[s, p].any() or statistics.sums.token_count_SPLE[s, p].any()
            # A file has one slice at least: also one that has only to say that something was lost.
            if not has_tokens and not (is_empty and (s, p) == (0, 0)):
                continue
            written.append(slice_name)
            for field, values in statistics.fields_by_name().items():
                tensors[tensor_name(slice_name, phase, field)] = _narrow(values[s, p])
        if slice_name in written and statistics.batches is not None:
            for field in BATCH_FIELDS:
                tensors[tensor_name(slice_name, BATCHES, field)] = _narrow(getattr(statistics.batches, field)[s])
    slices = tuple(name for name in header.slices if name in written)
    total = sum(checksum(memoryview(tensor.data).cast("B")) for tensor in tensors.values())
    metadata = {
        "format": FORMAT,
        "schema_version": str(SCHEMA_VERSION),
        "checksum": str(total % CHECKSUM_MODULUS),
        "header": header.model_copy(update={"schema_version": SCHEMA_VERSION, "slices": slices}).model_dump_json(),
    }
    content: bytes = save(tensors, metadata)
    return content


def checksum(content: memoryview) -> int:
    """Sum of the 64-bit little-endian words modulo 2^64, the end padded with zeros."""
    whole = len(content) // 8 * 8
    words = np.frombuffer(content[:whole], "<u8") if whole else np.zeros(0, "<u8")
    return (int(np.add.reduce(words)) + int.from_bytes(content[whole:], "little")) % CHECKSUM_MODULUS


Blocks = Iterator[tuple[Block, npt.NDArray[np.generic]]]


def read_blocks(handle: BinaryIO, layout: Layout, path: str) -> Blocks:
    """Reads the tensors in the order of their bytes from an open file, each into the buffer of the one before.

    Yields:
        The tensor's place, and its values as stored, valid until the next one is taken.

    Raises:
        InputFileError: A count is negative, a value is not finite, the file ends early, or, after the last tensor,
            the checksum disagrees.
    """
    buffer = memoryview(bytearray(max(block.num_bytes for block in layout.blocks)))

    def take(block: Block) -> memoryview:
        content = buffer[: block.num_bytes]
        _fill(handle, content, path)
        return content

    return _checked_blocks(take, layout, path)


def blocks_in_memory(content: memoryview, layout: Layout, path: str) -> Blocks:
    """The tensors of a whole file in memory, as `read_blocks` gives them.

    Raises:
        InputFileError: See `read_blocks`.
        StorageError: The file is not the one of the layout.
    """
    require_unchanged(content[: layout.header_bytes], layout, path)
    end = layout.blocks[-1].start + layout.blocks[-1].num_bytes
    if len(content) != end:
        raise corrupt(path, "it ends inside its tensors")
    return _checked_blocks(lambda block: content[block.start : block.start + block.num_bytes], layout, path)


def _checked_blocks(take: Callable[[Block], memoryview], layout: Layout, path: str) -> Blocks:
    total = 0
    for block in layout.blocks:
        content = take(block)
        total += checksum(content)
        values = np.frombuffer(content, block.dtype).reshape(block.shape)
        signed = block.dtype == COUNT_DTYPES["I64"] or block.dtype.kind == "f"
        if is_count(block.field) and signed and values.min(initial=0) < 0:
            raise corrupt(path, f"{block.field} holds a negative count")
        # One pass instead of two: a sum is finite only if its terms are.
        if block.dtype.kind == "f" and not np.isfinite(np.add.reduce(values, axis=None, dtype=np.float64)):
            raise corrupt(path, f"{block.field} holds a value that is not finite")
        yield block, values
    if total % CHECKSUM_MODULUS != layout.checksum:
        raise corrupt(path, "its tensors do not match the checksum in its header")


def _fill(handle: BinaryIO, content: memoryview, path: str) -> None:
    filled = 0
    while filled < len(content):
        count = handle.readinto(content[filled:])  # type: ignore[attr-defined]
        if not count:
            raise corrupt(path, "it ends inside its tensors")
        filled += count


def _narrow(values: Ints | Floats) -> npt.NDArray[np.generic]:
    contiguous = np.ascontiguousarray(values)
    if contiguous.dtype == np.int64:
        largest = int(contiguous.max(initial=0))
        name = "U16" if largest < 2**16 else "U32" if largest < 2**32 else "I64"
        return contiguous.astype(COUNT_DTYPES[name])
    single = contiguous.astype(FLOAT_DTYPES["F32"])
    return single if np.array_equal(single, contiguous) else contiguous.astype(FLOAT_DTYPES["F64"])
