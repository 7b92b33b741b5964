"""Scales of quantised weights: values that no calibration gives, and scales of which a kernel takes one for two."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.prune.checkpoint import Checkpoint
from reap_serve.records import JsonValue
from reap_serve.weight_headers import Tensor, open_regular

SCALE_NAMES = frozenset(
    {
        "input_global_scale",
        "input_scale",
        "k_scale",
        "output_scale",
        "scales",
        "v_scale",
        "weight_global_scale",
        "weight_scale",
        "weight_scale_2",
        "weight_scale_inv",
    }
)
SCALE_ENDINGS = ("_input_scale", "_scale_2", "_scale_inv", "_scales", "_weight_scale", ".scale")
# Of gate and up, fused into one weight, NVFP4 kernels take the first global scale for both (vLLM 0.32, modelopt.py and
# compressed_tensors_moe_w4a4_nvfp4.py).
SHARED_SCALES = ("weight_scale_2", "weight_global_scale")
INPUT_SCALES = ("input_scale", "input_global_scale")
SMALL_BYTES = 64 << 10


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales of a quantisation."""
    return name.rpartition(".")[2] in SCALE_NAMES or name.endswith(SCALE_ENDINGS)


class ScaleValues:
    """What the values of scales are, gathered piece by piece; several threads may bring pieces of different tensors."""

    def __init__(self) -> None:
        self._counts: dict[str, npt.NDArray[np.int64]] = {}
        self.numbers: dict[str, bytes] = {}

    def see(self, tensor: Tensor, piece: memoryview) -> None:
        """Takes in the next bytes of a tensor."""
        if not is_scale(tensor.name):
            return
        counts = _count(tensor.dtype, piece)
        if counts is not None:
            self._counts[tensor.name] = self._counts.get(tensor.name, np.zeros(3, np.int64)) + counts
        if tensor.num_bytes <= 8:
            self.numbers[tensor.name] = bytes(piece)

    def wrong(self, name: str) -> tuple[str, bool] | None:
        """What is wrong with a scale, and whether no value of it can be used; None when nothing is wrong.

        Zeros among other values are left: blocks of zeros have them.
        """
        counts = self._counts.get(name)
        if counts is None:
            return None
        special, zeros, total = (int(count) for count in counts)
        is_useless = special + zeros == total
        if special:
            return f"{name} holds {special} of {total} values that are NaN or infinite", is_useless
        return (f"{name} is zero", True) if is_useless else None

    def names(self) -> Iterable[str]:
        """Names of the scales that were seen."""
        return sorted(self._counts)


def _count(dtype: str, piece: memoryview) -> npt.NDArray[np.int64] | None:
    """Values that are NaN or infinite, zeros, and all; None for dtypes that no scale has."""
    if dtype in ("F32", "F64", "F16"):
        values = np.frombuffer(piece, {"F32": "<f4", "F64": "<f8", "F16": "<f2"}[dtype])
        special, zeros = ~np.isfinite(values), values == 0
    elif dtype == "BF16":
        bits = np.frombuffer(piece, "<u2")
        special, zeros = (bits & 0x7F80) == 0x7F80, (bits & 0x7FFF) == 0
    elif dtype in ("F8_E4M3", "F8_E5M2"):
        low = np.frombuffer(piece, "u1") & 0x7F
        special, zeros = low >= (0x7F if dtype == "F8_E4M3" else 0x7C), low == 0
    elif dtype in ("F8_E8M0", "U8"):
        exponents = np.frombuffer(piece, "u1")
        special, zeros = exponents == 0xFF, np.zeros(exponents.shape, np.bool_)
    else:
        return None
    return np.array([special.sum(), zeros.sum(), special.size])


def read_small_scales(checkpoint: Checkpoint, tensors: Iterable[Tensor]) -> ScaleValues:
    """The values of scales of at most 64 KiB, read one by one."""
    found = ScaleValues()
    by_file: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        if is_scale(tensor.name) and 0 < tensor.num_bytes <= SMALL_BYTES:
            by_file.setdefault(tensor.file, []).append(tensor)
    for file, group in by_file.items():
        descriptor = open_regular(checkpoint.directory / file)
        try:
            for tensor in sorted(group, key=lambda each: each.offset):
                found.see(tensor, memoryview(os.pread(descriptor, tensor.num_bytes, tensor.offset)))
        finally:
            os.close(descriptor)
    return found


@dataclass(frozen=True, slots=True)
class Doubt:
    """What speaks against an expert.

    Attributes:
        layer: Index of its layer; None outside the layers.
        is_mtp: Whether that is a multi-token-prediction layer.
        expert: Its id, None for a scale that is no single expert's.
        what: What is wrong, with names.
        is_certain: Whether it serves wrong numbers, and not only less exact ones.
    """

    layer: int | None
    is_mtp: bool
    expert: int | None
    what: str
    is_certain: bool


def doubts(values: ScaleValues, names: TensorNames, projections: Sequence[str]) -> Iterator[Doubt]:
    """Scales that are NaN, infinite or zero, and gates whose scale differs from that of their up projection.

    Args:
        values: Of the scales.
        names: Of the family.
        projections: Linear maps of an expert: gate and up first where there are three.
    """
    for name in values.names():
        role = names.role(name)
        if name.endswith(".scale") and role.kind is not Kind.EXPERT:
            continue  # a weight of that name, as of Gemma's router
        if (wrong := values.wrong(name)) is not None:
            yield Doubt(role.layer, role.is_mtp, role.expert, *wrong)
        if role.kind is not Kind.EXPERT or len(projections) != 3:
            continue
        gate, up = projections[:2]
        if not role.suffix.startswith(f"{gate}.") or name.rpartition(".")[2] not in SHARED_SCALES:
            continue
        other = name[: -len(role.suffix)] + up + role.suffix[len(gate) :]
        if other in values.numbers and values.numbers.get(name) != values.numbers[other]:
            what = f"{name} differs from {other}, and NVFP4 kernels take the first for both"
            yield Doubt(role.layer, role.is_mtp, role.expert, what, is_certain=False)


def lacks_input_scales(names: Iterable[str], quantization: Iterable[JsonValue]) -> bool:
    """Whether a checkpoint of 4-bit weights for 4-bit activations (W4A4, NVFP4) has no scale of activations at all."""
    last = {name.rpartition(".")[2] for name in names if ".experts." in name}
    if last.isdisjoint(SHARED_SCALES) or not last.isdisjoint(INPUT_SCALES):
        return False
    return any(_quantises_activations(each) for each in quantization)


def _quantises_activations(value: JsonValue) -> bool:
    if isinstance(value, Mapping):
        bits = (
            activations.get("num_bits") if isinstance(activations := value.get("input_activations"), Mapping) else None
        )
        return bits == 4 or value.get("quant_algo") == "NVFP4" or any(map(_quantises_activations, value.values()))
    return isinstance(value, list) and any(map(_quantises_activations, value))
