"""What a statistics file holds and where: every claim of its header is checked against the file's size.

A safetensors file: 8 bytes of header length, the header as JSON, the tensors. Tensors are named
`<slice>/<phase>/<sum>` and have the sum's declared axes (see `sums`) without S and P, most [L, E]. A slice and phase
without tokens has no tensors. `<slice>/batches/<sum>` are the moments of batches, absent when the file is one batch.

Headers of checkpoints are read elsewhere (`weight_headers`): they have other names and dtypes, and here the metadata is
judged before any tensor, so that a later version is told as one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
from pydantic import ValidationError

from reap_serve.errors import InputFileError, StorageError
from reap_serve.file_kinds import STATISTICS_FORMAT
from reap_serve.records import JsonValue, version_problem
from reap_serve.statistics.record import (
    BATCH_FIELDS,
    EXPERT_FIELDS,
    LAYER_FIELD,
    OPTIONAL_FIELDS,
    PHASES,
    SCHEMA_VERSION,
    SUMS,
    Header,
    is_count,
)
from reap_serve.weight_headers import read_beginning

FORMAT = STATISTICS_FORMAT
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

COUNT_DTYPES: dict[str, np.dtype[np.generic]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
FLOAT_DTYPES: dict[str, np.dtype[np.generic]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}

BATCHES = "batches"
_FIELD_OF_NAME = {SUMS[field].name: field for field in (*EXPERT_FIELDS, LAYER_FIELD)}
_BATCH_FIELD_OF_NAME = {SUMS[field].name: field for field in BATCH_FIELDS}


class Block(NamedTuple):
    """One tensor of a file; a file has hundreds, and a merge reads thousands of files.

    Attributes:
        field: Name in `ExpertSums`, or `layer_token_count_SPL`.
        slice_index: Position on axis S.
        phase_index: Position on axis P; None for the moments of batches, which have no such axis.
        dtype: As stored.
        shape: Without the axes S and P.
        start: First byte, from the start of the file.
        num_bytes: Length.
    """

    field: str
    slice_index: int
    phase_index: int | None
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A file's header and the places of its tensors.

    Attributes:
        header: The header.
        blocks: The tensors, in the order of their bytes; they fill the file without gaps.
        checksum: That the header promises, see `file.checksum`.
        header_bytes: Length of everything before the first tensor.
        header_sha256: Digest of it, to see whether a file changed between two readings.
    """

    header: Header
    blocks: tuple[Block, ...]
    checksum: int
    header_bytes: int
    header_sha256: bytes

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape, without the axes S and P, of each field with these axes that the file holds."""
        return {block.field: block.shape for block in self.blocks if block.phase_index is not None}

    @property
    def has_batches(self) -> bool:
        """Whether the file holds the moments of batches; else it is one batch."""
        return any(block.phase_index is None for block in self.blocks)


def tensor_name(slice_name: str, phase: str, field: str) -> str:
    """Name of the tensor that holds a field of a slice and phase."""
    return f"{slice_name}/{phase}/{SUMS[field].name}"


def corrupt(path: str, detail: str) -> InputFileError:
    """The error of a file that breaks the format."""
    return InputFileError(f"{path} is corrupt: {detail}", "restore it or leave it out")


def read_layout(handle: BinaryIO, size: int, path: str) -> Layout:
    """Reads and checks the header of an open file, which is left at its first tensor.

    Raises:
        InputFileError: The file is corrupt, truncated, no statistics, or of another version.
    """
    prefix, length, text = read_beginning(handle, min(size - 8, MAX_HEADER_BYTES))
    if text is None:
        raise corrupt(path, f"its {size} bytes do not hold the safetensors header that they announce")
    # A forged length is seen before tensors are decoded as text, which could take four times their bytes.
    if not (text.startswith(b"{") and text.endswith((b"}", b" "))):
        raise corrupt(path, "its safetensors header is not JSON")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise corrupt(path, "its safetensors header is not JSON") from None
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputFileError(f"{path} is no statistics file of reap-serve", "give a file that observe or merge wrote")
    _require_version(metadata.get("schema_version"), path)
    header = _parse_header(metadata.get("header"), path)
    promised = _parse_natural(metadata.get("checksum"))
    if promised is None:
        raise corrupt(path, "its header has no checksum")
    blocks = _parse_blocks(entries, header, 8 + length, size, path)
    return Layout(header, blocks, promised, 8 + length, hashlib.sha256(prefix + text).digest())


def require_unchanged(header: bytes | memoryview, layout: Layout, path: str) -> None:
    """Refuses a file whose header is not the one that was read before.

    Args:
        header: The first `header_bytes` of the file, now.
        layout: What was read before.
        path: The file.

    Raises:
        StorageError: It changed.
    """
    if hashlib.sha256(header).digest() != layout.header_sha256:
        raise StorageError(f"{path} changed while it was read", "run the command again")


def _parse_natural(text: JsonValue) -> int | None:
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 20 else None


def _require_version(text: JsonValue, path: str) -> None:
    version = _parse_natural(text)
    if version is None:
        raise corrupt(path, "its header has no schema version")
    if (problem := version_problem(version, SCHEMA_VERSION)) is not None:
        raise InputFileError(f"{path}: {problem}", "use the release of reap-serve that wrote it")


def _parse_header(text: JsonValue, path: str) -> Header:
    if not isinstance(text, str):
        raise corrupt(path, "its metadata holds no header")
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise corrupt(path, f"its header is invalid: {ascii(place)[1:-1]}: {ascii(first['msg'])[1:-1]}") from None
    except UnicodeError:
        raise corrupt(path, "its header is not UTF-8") from None


def _parse_blocks(
    entries: dict[str, JsonValue], header: Header, data_start: int, size: int, path: str
) -> tuple[Block, ...]:
    slice_indices = {name: index for index, name in enumerate(header.slices)}
    blocks = []
    for name, entry in entries.items():
        owner, _, short_name = name.rpartition("/")
        slice_name, _, part = owner.rpartition("/")
        phase_index = PHASES.index(part) if part in PHASES else None
        field = (_BATCH_FIELD_OF_NAME if part == BATCHES else _FIELD_OF_NAME).get(short_name)
        if slice_name not in slice_indices or field is None or (phase_index is None and part != BATCHES):
            raise corrupt(path, f"it holds a tensor {ascii(name)[:120]} that its header does not explain")
        dtypes = COUNT_DTYPES if is_count(field) and header.ageing is None else FLOAT_DTYPES
        block = _parse_block(entry, dtypes, field, slice_indices[slice_name], phase_index, data_start, size)
        if block is None:
            raise corrupt(path, f"the header's entry of a tensor {field} is malformed")
        blocks.append(block)
    blocks.sort(key=lambda block: block.start)
    end = data_start
    for block in blocks:
        if block.start != end:
            raise corrupt(path, "its tensors overlap or leave gaps")
        end += block.num_bytes
    if end != size:
        raise corrupt(path, f"it has {size} bytes where its header needs {end}")
    _require_whole_slices(blocks, header, path)
    return tuple(blocks)


def _parse_block(
    entry: JsonValue,
    dtypes: Mapping[str, np.dtype[np.generic]],
    field: str,
    s: int,
    p: int | None,
    data_start: int,
    size: int,
) -> Block | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return None
    dtype = dtypes.get(entry["dtype"])
    shape, offsets = _parse_sizes(entry.get("shape"), size), _parse_sizes(entry.get("data_offsets"), size)
    if dtype is None or shape is None or offsets is None or len(offsets) != 2:
        return None
    num_bytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != num_bytes:
        return None
    return Block(field, s, p, dtype, shape, data_start + offsets[0], num_bytes)


def _parse_sizes(value: JsonValue, limit: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > 3:
        return None
    for item in value:
        if type(item) is not int or not 0 <= item <= limit:
            return None
    return tuple(value)


def _require_whole_slices(blocks: list[Block], header: Header, path: str) -> None:
    """Every slice has a phase, every phase every field, every field one shape: memory stays in proportion to bytes."""
    shapes = {block.field: block.shape for block in blocks}
    required = {field for field in (*EXPERT_FIELDS, LAYER_FIELD) if field not in OPTIONAL_FIELDS or field in shapes}
    fields_of_part: dict[tuple[int, int | None], set[str]] = {}
    if header.model.num_experts < 1:
        raise corrupt(path, f"its model has {header.model.num_experts} experts")
    for block in blocks:
        fields_of_part.setdefault((block.slice_index, block.phase_index), set()).add(block.field)
        wanted = _shape(block, shapes, header)
        if block.shape != wanted:
            raise corrupt(path, f"{block.field} has shape {block.shape} where its header needs {wanted}")
    num_slices = len(header.slices)
    if {s for s, p in fields_of_part if p is not None} != set(range(num_slices)):
        raise corrupt(path, "a slice of its header has no tensors")
    if sum(p is None for _, p in fields_of_part) not in (0, num_slices):
        raise corrupt(path, "a slice has no moments of batches while others do")
    for (_, p), found in fields_of_part.items():
        missing = (set(BATCH_FIELDS) if p is None else required) - found
        if missing:
            raise corrupt(path, f"a part of a slice lacks {', '.join(sorted(missing))}")


def _shape(block: Block, shapes: Mapping[str, tuple[int, ...]], header: Header) -> tuple[int, ...]:
    return SUMS[block.field].stored_shape(len(header.layers), header.model.num_experts, shapes[block.field])
