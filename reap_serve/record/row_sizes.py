"""Norms and largest components of rows.

Axes: N rows, H hidden.
"""

from __future__ import annotations

import torch

# A block is read three times, twice from the cache. It is no smaller, since each operation on one makes all threads
# meet, which takes up to a millisecond inside an engine.
BLOCK_ELEMENTS = 2**19


def row_sizes(rows_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """2-norm and largest absolute component of each row [N], float32."""
    num_rows, hidden = rows_NH.shape
    size_N, highest_N, lowest_N = torch.empty(3, num_rows, dtype=torch.float32, device=rows_NH.device)
    block = num_rows if rows_NH.is_cuda else max(1, min(num_rows, BLOCK_ELEMENTS // hidden))
    for start in range(0, num_rows, block):
        part = slice(start, min(start + block, num_rows))
        # PyTorch's reductions of bfloat16 with a float32 result take up to nine times as long as those of float32.
        block_NH = rows_NH[part].float()
        torch.linalg.vector_norm(block_NH, dim=-1, out=size_N[part])
        # Two reductions take half as long as one of absolute values, which would be written to memory first.
        torch.amax(block_NH, dim=-1, out=highest_N[part])
        torch.amin(block_NH, dim=-1, out=lowest_N[part])
    return size_N, torch.maximum(highest_N, lowest_N.neg_(), out=highest_N)
