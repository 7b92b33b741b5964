"""Norms and largest components of rows.

Axes: N rows, H hidden.
"""

from __future__ import annotations

import torch

# A block bounds the memory. It is no smaller, since each operation on one makes all threads meet, which takes up to a
# millisecond inside an engine: as long as reading the block from memory.
BLOCK_ELEMENTS = 2**21


def row_sizes(rows_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """2-norm and largest absolute component of each row [N], float32."""
    num_rows, hidden = rows_NH.shape
    size_N = torch.empty(num_rows, dtype=torch.float32, device=rows_NH.device)
    largest_N = torch.empty_like(size_N)
    block = num_rows if rows_NH.is_cuda else max(1, min(num_rows, BLOCK_ELEMENTS // hidden))
    scratch = torch.empty(block, hidden, dtype=torch.float32, device=rows_NH.device)
    for start in range(0, num_rows, block):
        stop = min(start + block, num_rows)
        block_NH, wide_NH = rows_NH[start:stop], scratch[: stop - start]
        if block_NH.dtype != torch.float32:
            # PyTorch's reductions of bfloat16 with a float32 result take up to nine times as long as those of float32.
            block_NH = wide_NH.copy_(block_NH)
        torch.linalg.vector_norm(block_NH, dim=-1, out=size_N[start:stop])
        torch.amax(torch.abs(block_NH, out=wide_NH), dim=-1, out=largest_N[start:stop])
    return size_N, largest_N
