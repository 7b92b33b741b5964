"""Whether vLLM can share a checkpoint's experts between tensor-parallel ranks.

vLLM cuts every expert along its intermediate width, one part a rank. A part must be a whole number of elements and,
where weights are quantised in blocks or groups, of those: a scale cannot stand on two ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.architectures.spec import RoutingLimits
from reap_serve.prune.findings import Finding, error, warning
from reap_serve.prune.parameters import num_values
from reap_serve.records import JsonValue
from reap_serve.weight_headers import Tensor

# Rows and columns of a block (FP8; compressed-tensors), columns of a group (AWQ, GPTQ, ModelOpt, compressed-tensors).
GRANULARITY_KEYS = frozenset({"weight_block_size", "block_structure", "group_size", "q_group_size"})


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What of the experts is cut.

    Attributes:
        widths: Intermediate widths that occur, ascending.
        granularity: Elements along the width that must stay together, 1 where weights are not quantised in blocks.
    """

    widths: tuple[int, ...]
    granularity: int


def inspect_parallel(shape: ExpertShape, limits: RoutingLimits, ranks: int) -> Iterator[Finding]:
    """Whether the experts can be cut for a number of ranks.

    Yields:
        Errors for what vLLM refuses or could only serve wrong; a warning when expert-parallel ranks would hold
        different numbers of experts, which vLLM allows without EPLB and with some kernels.
    """
    for width in shape.widths:
        if width % ranks:
            yield error("parallel", f"experts are {width} wide: {ranks} tensor-parallel ranks cannot share that")
        elif width // ranks % shape.granularity:
            yield error(
                "parallel",
                f"experts are {width} wide: the {width // ranks} of one of {ranks} tensor-parallel ranks are no "
                f"multiple of the quantisation's {shape.granularity}",
            )
    counts = sorted({limits.experts_in(layer) for layer in limits.moe_layers})
    if counts[0] < ranks:
        yield error("parallel", f"{ranks} tensor-parallel ranks for {counts[0]} experts: vLLM wants an expert a rank")
    for count in counts:
        if count % ranks:
            yield warning(
                "parallel", f"{count} experts: with expert parallelism {ranks} ranks would hold different numbers"
            )


def expert_shape(
    tensors: Iterable[Tensor],
    names: TensorNames,
    text_config: Mapping[str, JsonValue],
    quantization: Iterable[JsonValue],
    hidden_keys: Sequence[str],
) -> ExpertShape:
    """The experts' widths from headers, and the granularity from quantisation configurations.

    A weight of an expert has `hidden * width` values, or twice as many where gate and up are one tensor: the least of a
    layer tells the width, in every layout and packing.

    Args:
        tensors: Of the checkpoint.
        names: Of the family.
        text_config: The decoder's configuration.
        quantization: Configurations of the quantisation.
        hidden_keys: Keys of the experts' input width where that is not the router's.
    """
    stated = [value for key in hidden_keys if isinstance(value := text_config.get(key), int) and value > 0]
    hidden: dict[int, int] = {}
    values: dict[int, list[int]] = {}
    for tensor in tensors:
        role = names.role(tensor.name)
        if role.layer is None or role.is_mtp:
            continue
        if role.kind is Kind.ROUTER and len(tensor.shape) == 2:
            hidden[role.layer] = stated[0] if stated else tensor.shape[1 - role.axis]
        elif role.kind in (Kind.EXPERT, Kind.STACKED) and len(tensor.shape) > 1 and not role.suffix.endswith("bias"):
            size = num_values(tensor, tensor.shape)
            count = tensor.shape[role.axis] if role.kind is Kind.STACKED else 1
            if size and count:
                values.setdefault(role.layer, []).append(size // count)
    widths = {min(sizes) // hidden[layer] for layer, sizes in values.items() if hidden.get(layer)}
    return ExpertShape(tuple(sorted(widths)), math.lcm(*(each for part in quantization for each in _granularity(part))))


def _granularity(value: JsonValue) -> Iterator[int]:
    entries = value.items() if isinstance(value, Mapping) else ()
    for key, entry in entries:
        stated = entry if isinstance(entry, list) else [entry]
        if key in GRANULARITY_KEYS:
            yield from (number for number in stated if type(number) is int and number > 0)
        elif key != "input_activations":
            # Activations are quantised while serving: their groups do not bind the weights.
            for each in stated:
                yield from _granularity(each)
