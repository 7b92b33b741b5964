"""Which rows of a tensor that belongs to a router go with the experts: by its shape, whatever quantised it."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from reap_serve.architectures.names import Kind, Role
from reap_serve.errors import ArchitectureError
from reap_serve.weight_headers import DTYPE_BITS, Tensor, open_regular

SHAPE_PART = "weight_shape"
# One entry an input of the router: they know nothing of experts.
INPUT_PARTS = frozenset({"g_idx", "weight_g_idx"})
# GPTQ and AWQ pack along the outputs, compressed-tensors packs its zero points so.
PACKED_PARTS = frozenset({"qweight", "qzeros", "scales", "weight_zero_point"})
REPORT = "report the checkpoint"
NUMBER_WORDS = {2: "two", 4: "four", 8: "eight", 16: "sixteen"}


class Rows(Enum):
    """What a cut does to a tensor of a router."""

    ALL = "all"
    SLICED = "sliced"
    STATED = "stated"


def rows_of(tensor: Tensor, role: Role, rows: int) -> Rows:
    """What becomes of a tensor beside a router's weight: all of it stays, its rows are cut, or it states their number.

    Args:
        tensor: The tensor.
        role: Its role, of the kind ROUTER_PART.
        rows: Rows of the router.

    Raises:
        ArchitectureError: Several experts share a number of it, or its shape fits nothing.
    """
    assert role.kind is Kind.ROUTER_PART
    part, shape = role.suffix.rpartition(".")[2], tensor.shape
    if part == SHAPE_PART:
        if tensor.dtype in ("I32", "I64") and shape == (2,):
            return Rows.STATED
        raise ArchitectureError(f"{tensor.name} is {tensor.dtype} {list(shape)}, two whole numbers expected", REPORT)
    if part in INPUT_PARTS or tensor.num_bytes == 0:
        return Rows.ALL
    if part in PACKED_PARTS and (part != "weight_zero_point" or shape[:1] != (rows,)):
        raise ArchitectureError(*_packed(tensor, rows))
    if len(shape) > role.axis and shape[role.axis] == rows:
        return Rows.SLICED
    if all(length == 1 for length in shape):
        return Rows.ALL
    # FP8 in blocks: one block of rows that covers every expert has one row of scales, before and after.
    if part.endswith(("_scale", "_scale_inv")) and shape[role.axis] == 1:
        return Rows.ALL
    if part.endswith(("_scale", "_scale_inv")) and shape[role.axis] < rows:
        raise ArchitectureError(
            f"{tensor.name}: {rows} rows of the router share {shape[role.axis]} rows of scales, and a cut would move "
            "experts between them",
            "leave the router out of the quantisation",
        )
    raise ArchitectureError(
        f"{tensor.name} has the shape {list(shape)}, config.json promises {rows} experts",
        f"mend config.json, or {REPORT}",
    )


def holds_packed(tensor: Tensor, rows: int) -> bool | None:
    """Whether a tensor that packs experts along an axis holds as many as the router has rows; None for other tensors.

    Numbers of 2, 3, 4 and 8 bits stand in an int32; GPTQ packs its weight along the inputs instead, and scales are not
    packed.
    """
    part = tensor.name.rpartition(".")[2]
    if part not in PACKED_PARTS or not tensor.shape:
        return None
    length = tensor.shape[0 if part == "weight_zero_point" else -1]
    return length == rows or (part != "scales" and any(length * 32 == rows * bits for bits in (2, 3, 4, 8)))


def stated_rows(directory: Path, tensor: Tensor) -> int:
    """The number of rows that a `weight_shape` states."""
    descriptor = open_regular(directory / tensor.file)
    try:
        return int.from_bytes(os.pread(descriptor, DTYPE_BITS[tensor.dtype] // 8, tensor.offset), "little")
    finally:
        os.close(descriptor)


def _packed(tensor: Tensor, rows: int) -> tuple[str, str]:
    lengths = tensor.shape[:1] if tensor.name.endswith("weight_zero_point") else tensor.shape[-1:]
    word = NUMBER_WORDS.get(rows // lengths[0] if lengths and lengths[0] else 0, "of 4 bits, eight")
    return (
        f"{tensor.name}: the router is quantised along its experts, and {word} experts share each int32: "
        f"no byte belongs to one expert",
        "leave the router out of the quantisation, as the lists of modules of GPTQ and AWQ can",
    )
