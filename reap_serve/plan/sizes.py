"""How many bytes a checkpoint's tensors take at a number of experts. L layers with routed experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


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
