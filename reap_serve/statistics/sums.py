"""How a sum is declared: once, as a field of `record.ExpertSums` or `record.BatchSums`, with what follows from it.

The recorder's memory and its file's layout, merging, the exchange with other tools and the views read the declarations;
only the formula is elsewhere, by the sum's name: in `record/accumulate.py` or `record/extra_sums.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import numpy as np

KEY = "sum"


class Merge(Enum):
    """How two values of a sum become one."""

    ADD = "add"
    MAX = "max"

    @property
    def combine(self) -> np.ufunc:
        """The operation."""
        return np.add if self is Merge.ADD else np.maximum


class Of(Enum):
    """What a sum runs over, and so what its formula is given.

    ROUTES: each (token, chosen expert): the gate weight, norm and largest component of the expert's output.
    OUTPUTS: the same with the outputs themselves.
    LOGITS: each token's logits in the router.
    TOKENS: each token of a layer.
    BATCHES: each batch of requests.
    """

    ROUTES = "routes"
    OUTPUTS = "outputs"
    LOGITS = "logits"
    TOKENS = "tokens"
    BATCHES = "batches"


@dataclass(frozen=True, slots=True)
class Sum:
    """A declared sum.

    Attributes:
        field: Its field: name and axes, such as `norm_sum_SPLE`.
        of: What it runs over.
        merge: How two of it become one.
        is_count: It holds integers; else float64.
        is_optional: A file may lack it: nobody asked for it, or an earlier release wrote the file.
        reference: Its name in the reference implementation's observer state, None where that has none.
    """

    field: str
    of: Of
    merge: Merge
    is_count: bool
    is_optional: bool
    reference: str | None

    @property
    def name(self) -> str:
        """The name in files and views."""
        return self.field.rpartition("_")[0]

    @property
    def axes(self) -> str:
        """The axes in memory: S slices, P phases, L layers, E experts, H hidden."""
        return self.field.rpartition("_")[2]

    @property
    def is_asked_for(self) -> bool:
        """Whether it is collected only when asked for: it needs more than what every recorder measures."""
        return self.of in (Of.OUTPUTS, Of.LOGITS)

    @property
    def is_per_expert(self) -> bool:
        """Whether it is one number an expert."""
        return self.axes == "SPLE"

    def stored_shape(self, num_layers: int, num_experts: int, found: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of its tensor in a file, without S and P; of the hidden dimension any size is right.

        Args:
            num_layers: Layers of the file.
            num_experts: Experts a layer.
            found: The tensor's shape, for the hidden dimension.
        """
        axes = self.axes.lstrip("SP")
        sizes = {"L": num_layers, "E": num_experts, "H": found[-1] if found else 0}
        return tuple(sizes[axis] for axis in axes)


def declared(
    of: Of, *, merge: Merge = Merge.ADD, is_count: bool = False, reference: str | None = None
) -> dict[str, Any]:
    """The metadata of a field that holds a sum; a field with a default is optional."""
    return {KEY: {"of": of, "merge": merge, "is_count": is_count, "reference": reference}}


def sums_of(record: type) -> tuple[Sum, ...]:
    """The sums that a dataclass declares, in the order of its fields."""
    return tuple(
        Sum(field=field.name, is_optional=field.default is None, **field.metadata[KEY])
        for field in fields(record)
        if KEY in field.metadata
    )
