"""The average of experts' weights, with their hidden units permuted to fit each other where asked.

An expert's output does not depend on the order of its hidden units, so that two experts that compute alike may look
unlike. Aligning finds the order in which one's weights have the largest product with the other's, by the Hungarian
algorithm (arXiv 2209.04836, section 3.2; used by M-SMoE and REAM).

Axes: H hidden dimension of the model, I units of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from reap_serve.errors import ArchitectureError

Singles = npt.NDArray[np.float32]
Weights = Mapping[str, Singles]

# Linear maps by the last part of their name: into the units [I, H], and back [H, I].
INTO_UNITS = frozenset({"gate_proj", "up_proj", "w1", "w3"})
OUT_OF_UNITS = frozenset({"down_proj", "w2"})


def average(members: Sequence[Weights], weights: Sequence[float]) -> dict[str, Singles]:
    """The weighted mean of each tensor, computed in float64."""
    return {
        name: np.sum(
            [weight * member[name].astype(np.float64) for member, weight in zip(members, weights, strict=True)], axis=0
        ).astype(np.float32)
        for name in members[0]
    }


def aligned(reference: Weights, expert: Weights) -> dict[str, Singles]:
    """An expert with its units in the order that fits a reference best; it computes the same.

    Args:
        reference: Tensors by name below the expert, such as `gate_proj.weight`.
        expert: The same of the other.

    Raises:
        ArchitectureError: A tensor is none of the known linear maps.
    """
    from scipy.optimize import linear_sum_assignment

    num_units = reference[next(iter(reference))].shape[_unit_axis(next(iter(reference)))]
    product_II = np.zeros((num_units, num_units))
    for name, wanted in reference.items():
        axis = _unit_axis(name)
        left = np.moveaxis(wanted, axis, 0).reshape(num_units, -1)
        right = np.moveaxis(expert[name], axis, 0).reshape(num_units, -1)
        product_II += left @ right.T
    _, order_I = linear_sum_assignment(product_II, maximize=True)
    return {name: np.take(values, order_I, axis=_unit_axis(name)) for name, values in expert.items()}


def merge_group(
    members: Sequence[Weights], weights: Sequence[float], dominant: int, aligns: bool
) -> dict[str, Singles]:
    """The weights of the expert that a group becomes.

    Args:
        members: Tensors of each member by name below the expert.
        weights: Of each member.
        dominant: Position of the dominant member, which the others are aligned to.
        aligns: Whether they are.
    """
    if aligns:
        members = [
            member if position == dominant else aligned(members[dominant], member)
            for position, member in enumerate(members)
        ]
    return average(members, weights)


def _unit_axis(name: str) -> int:
    for part in name.split("."):
        if part in INTO_UNITS:
            return 0
        if part in OUT_OF_UNITS:
            return 1
    raise ArchitectureError(f"the units of {name} are not known, so they cannot be aligned", "give --no-align")
