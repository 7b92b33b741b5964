"""How many bytes a checkpoint's tensors take at a number of experts, from the headers alone. L layers with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.errors import InputFileError
from reap_serve.model import ModelSource
from reap_serve.records import read_json_object
from reap_serve.weight_headers import read_shard

Ints = npt.NDArray[np.int64]

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class CheckpointBytes:
    """Bytes of a checkpoint's tensors, without file headers.

    Attributes:
        fixed_bytes: Of all that does not count experts.
        expert_bytes_L: Of one expert of each layer, with its router row.
        mtp_expert_bytes: Of one expert of all multi-token-prediction layers together; they keep as many experts as the
            largest layer of the trunk, since vLLM builds them from the trunk's count.
    """

    fixed_bytes: int
    expert_bytes_L: Ints
    mtp_expert_bytes: int = 0

    def at(self, count_L: Ints) -> int:
        """Bytes when layer l keeps `count_L[l]` experts."""
        return self.fixed_bytes + int(count_L @ self.expert_bytes_L) + int(count_L.max()) * self.mtp_expert_bytes

    def at_uniform(self, count: int) -> int:
        """Bytes when every layer keeps `count` experts."""
        return self.at(np.full(len(self.expert_bytes_L), count))


def measure_checkpoint(source: ModelSource) -> CheckpointBytes:
    """Sorts the bytes of a model's tensors by whether they count experts; reads the headers only.

    Experts of one layer are taken to be of equal size.

    Raises:
        ArchitectureError: The family is unknown, or the model has no routed experts.
        InputFileError: A weight file is missing or its header cannot be read.
    """
    family = resolve(source.config)
    limits = family.limits(source.config)
    names = TensorNames(family, family.num_layers(source.config))
    position = {layer: index for index, layer in enumerate(limits.moe_layers)}
    routed_bytes_L = np.zeros(len(limits.moe_layers), np.int64)
    fixed_bytes = mtp_routed_bytes = 0
    for name, shape, num_bytes in _tensors(source.path):
        role = names.role(name)
        routed_bytes = 0
        if role.kind is Kind.EXPERT:
            routed_bytes = num_bytes
        elif role.kind in (Kind.ROUTER, Kind.SLICED, Kind.STACKED):
            rows = shape[role.axis] if role.axis < len(shape) else 0
            if rows < limits.num_experts:
                raise InputFileError(
                    f"{name} has shape {list(shape)}, too small for {limits.num_experts} experts on axis {role.axis}",
                    "is config.json of this checkpoint?",
                )
            # Routers of some families have rows after the experts' that stand for no expert.
            routed_bytes = num_bytes // rows * limits.num_experts
        fixed_bytes += num_bytes - routed_bytes
        if role.is_mtp:
            mtp_routed_bytes += routed_bytes
        elif role.layer in position:
            routed_bytes_L[position[role.layer]] += routed_bytes
        else:
            fixed_bytes += routed_bytes
    return CheckpointBytes(fixed_bytes, routed_bytes_L // limits.num_experts, mtp_routed_bytes // limits.num_experts)


def _tensors(directory: Path) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and bytes of each tensor that the checkpoint's index names, or of all without an index."""
    index = directory / INDEX
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise InputFileError(f"{index} has no weight_map", "download it again")
        files = sorted({str(file) for file in weight_map.values()})
        if any(Path(file).is_absolute() or ".." in Path(file).parts for file in files):
            raise InputFileError(f"{index} names files outside the checkpoint", "download it again")
    else:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    for file in files:
        for tensor in read_shard(directory / file).tensors:
            yield tensor.name, tensor.shape, tensor.num_bytes
