"""Parameters of a model, total and active per token, counted from headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.weight_headers import Tensor

# What quantised checkpoints add beside their weights.
NOT_PARAMETERS = (
    "_scale",
    "_scales",
    "_scale_inv",
    "_scale_2",
    "_zero_point",
    "_shape",
    "_g_idx",
    "global_scale",
    ".scales",
    ".scale",
    ".qzeros",
    ".g_idx",
)
PACKED_ENDINGS = ("weight_packed", "qweight", "_blocks")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Elements of a model's weights.

    Attributes:
        total: All of them, embeddings included.
        active: Those that take part in one token: of the experts top-k of each layer; without
            multi-token-prediction layers.
    """

    total: int
    active: int


def count_parameters(
    names: TensorNames,
    tensors: Iterable[tuple[Tensor, tuple[int, ...]]],
    experts_in: Callable[[int], int],
    top_k: int,
) -> Parameters:
    """Counts tensors in the shape that they have; packed 4-bit weights count each of their values.

    Args:
        names: Of the family.
        tensors: Each with its shape.
        experts_in: Experts of a trunk layer.
        top_k: Experts chosen per token.
    """
    shared = mtp = 0
    routed: Counter[int] = Counter()
    for tensor, shape in tensors:
        role = names.role(tensor.name)
        size = num_values(tensor, shape)
        if role.is_mtp:
            mtp += size
        elif role.kind in (Kind.EXPERT, Kind.STACKED):
            assert role.layer is not None
            routed[role.layer] += size
        else:
            shared += size
    active = sum(size * top_k // experts_in(layer) for layer, size in routed.items())
    return Parameters(shared + routed.total() + mtp, shared + active)


def num_values(tensor: Tensor, shape: tuple[int, ...]) -> int:
    """Values that a tensor of this shape holds: eight of 4 bits in an I32, two in a U8; 0 for scales and their like."""
    if tensor.name.endswith(NOT_PARAMETERS):
        return 0
    per_element = {"I32": 8, "U8": 2}.get(tensor.dtype, 1)
    is_packed = tensor.name.endswith(PACKED_ENDINGS) or (tensor.dtype == "U8" and tensor.name.endswith("weight"))
    return math.prod(shape) * (per_element if is_packed else 1)
