"""The data-parallel ranks of one server, for measurements that they make together.

Target: `DPMetadata.local_sizes` of the running forward pass: rows of each rank, by which a layer's kernel gathers the
    rows of all ranks and returns to each its own.
Why: experts are shared by the ranks, so that a held-back row is measured by a kernel call in which all take part.
How: while a measurement runs, the sizes are those of its rows.
Upstream: kernels are called by the model's layers alone.
Remove when: vLLM gives a kernel the numbers of rows as an argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch


class DataParallelPeers:
    """See `record.lockstep.Peers`."""

    def exchange(self, mine: Sequence[int]) -> Sequence[Sequence[int]]:
        """The numbers of all ranks."""
        from vllm.distributed import get_dp_group

        group = get_dp_group()
        told = torch.zeros(group.world_size, len(mine), dtype=torch.int64)
        told[group.rank_in_group] = torch.tensor(mine, dtype=torch.int64)
        torch.distributed.all_reduce(told, group=group.cpu_group)
        numbers: list[list[int]] = told.tolist()
        return numbers

    def forward_of(self, num_rows: int) -> AbstractContextManager[None]:
        """Kernel calls take so many rows of every rank."""
        return _sizes(num_rows)


@contextmanager
def _sizes(num_rows: int) -> Iterator[None]:
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().dp_metadata
    assert metadata is not None
    sizes = metadata.local_sizes
    assert sizes is not None
    metadata.local_sizes = [num_rows] * len(sizes)
    try:
        yield
    finally:
        metadata.local_sizes = sizes
