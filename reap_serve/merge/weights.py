"""Experts' weights in and out of a safetensors checkpoint, as float32.

Reads and writes single tensors by the offsets of the headers; nothing else is loaded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.errors import ArchitectureError
from reap_serve.merge.average import Singles
from reap_serve.weight_headers import Tensor

FLOAT_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Part:
    """One expert's share of a tensor.

    Attributes:
        tensor: The tensor.
        axis: Axis of the experts in a tensor that holds all of them, None in one of a single expert.
        row: The expert's place on that axis.
    """

    tensor: Tensor
    axis: int | None = None
    row: int = 0


Experts = Mapping[int, Mapping[int, Mapping[str, Part]]]


def experts_of(tensors: Iterable[Tensor], names: TensorNames, num_experts: int) -> Experts:
    """Where each expert's weights stand: by layer, expert, and name below the expert; multi-token-prediction layers
    are left out.

    Raises:
        ArchitectureError: An expert's tensor is no bfloat16, float16 or float32.
    """
    found: defaultdict[int, defaultdict[int, dict[str, Part]]] = defaultdict(lambda: defaultdict(dict))
    for tensor in tensors:
        role = names.role(tensor.name)
        if role.kind not in (Kind.EXPERT, Kind.STACKED) or role.is_mtp or role.layer is None:
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            raise ArchitectureError(
                f"{tensor.name} is {tensor.dtype}: averages of quantised experts are none of the quantised values",
                "merge a bfloat16 or float32 checkpoint",
            )
        if role.kind is Kind.EXPERT and role.expert is not None:
            found[role.layer][role.expert][role.suffix] = Part(tensor)
        elif len(tensor.shape) > role.axis:
            for expert in range(num_experts):
                found[role.layer][expert][role.suffix] = Part(tensor, role.axis, expert)
    return found


def read_part(directory: Path, part: Part) -> Singles:
    """An expert's share of a tensor."""
    values = _map(directory, part, "r")
    if part.tensor.dtype == "BF16":
        single: Singles = np.left_shift(np.asarray(values, "<u4"), 16).view("<f4")
        return single
    return np.asarray(values, "<f4")


def write_part(directory: Path, part: Part, values: Singles) -> None:
    """Overwrites an expert's share of a tensor; bfloat16 is rounded to the nearest, ties to even."""
    target = _map(directory, part, "r+")
    if part.tensor.dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        target[...] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    else:
        target[...] = values


def _map(directory: Path, part: Part, mode: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    tensor = part.tensor
    dtype = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[tensor.dtype]
    # A map of the whole file at an offset that need not be a page's.
    content = np.memmap(directory / tensor.file, np.uint8, mode=mode)  # type: ignore[call-overload]
    view = content[tensor.offset : tensor.offset + math.prod(tensor.shape) * np.dtype(dtype).itemsize].view(dtype)
    shaped = view.reshape(tensor.shape)
    return shaped if part.axis is None else np.moveaxis(shaped, part.axis, 0)[part.row]  # type: ignore[no-any-return]
