"""The expert outputs that vLLM's CPU kernel leaves in its scratch memory, read where they are.

Target: the scratch memory of `cpu_fused_moe` in vLLM's C++ extension: per expert the number of its rows [E] and their
    running sum [E + 1], per row its token [N], per route its row [N], all int32; activations [N, I] in the
    layer's dtype; rows [N, H] in float32. Each part begins at a multiple of 64 bytes.
Why: the kernel computes f_j(x) of every route, adds a token's K rows up, and leaves them unweighted and unrounded
    until its next call. To compute them again costs a second pass over the experts; to read them costs N*H*4 bytes.
How: the extension exports the function that tells where the memory is. Whether the layout is as above is tried for each
    layer when the model is loaded: rows as read must be those that the kernel returns for one expert at a time. A layer
    that fails is observed by calling its kernel again.
Upstream: none hands the rows out.
Remove when: vLLM's kernel returns its rows, as the Triton experts do in `moe_sum`.

Axes: T tokens, K experts per token, N = T*K rows, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from reap_serve.record.expand import expert_rows
from reap_serve.record.recorder import LayerFacts

PROBE_TOKENS = 33
INT32_BYTES = FLOAT32_BYTES = 4
HUGE_PAGE_BYTES = 2**21
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25


class Scratchpad:
    """The scratch memory of this process's kernels.

    Args:
        address: Of the manager object: size in bytes and pointer, eight bytes each.
    """

    def __init__(self, address: int) -> None:
        self._size = ctypes.c_size_t.from_address(address)
        self._pointer = ctypes.c_size_t.from_address(address + ctypes.sizeof(ctypes.c_size_t))
        self._seen = (0, 0)
        self._words = torch.empty(0, dtype=torch.int32)

    def words(self) -> torch.Tensor:
        """The memory as int32; valid until the next kernel call."""
        now = (self._size.value, self._pointer.value)
        if now != self._seen:
            size_bytes, pointer = now
            if pointer == 0:
                return self._words
            _ask_for_huge_pages(pointer, size_bytes)
            memory = (ctypes.c_char * size_bytes).from_address(pointer)
            self._words = torch.frombuffer(memory, dtype=torch.int32)
            self._seen = now
        return self._words


class KernelRows:
    """Reads the rows of one layer's latest kernel call.

    Args:
        scratchpad: The memory.
        num_experts: Experts of the layer.
        intermediate: Width of the activations, with vLLM's padding.
        hidden: Width of the rows.
        activation_bytes: Of one activation.

    Attributes:
        row_bytes: Of one row.
    """

    def __init__(
        self, scratchpad: Scratchpad, num_experts: int, intermediate: int, hidden: int, activation_bytes: int
    ) -> None:
        self._scratchpad = scratchpad
        self._counts_bytes = _whole_lines(num_experts * INT32_BYTES) + _whole_lines((num_experts + 1) * INT32_BYTES)
        # Views of the last call, which most often fit the next.
        self._viewed = torch.empty(0, dtype=torch.int32)
        self._views = (torch.empty(0, hidden), torch.empty(0, dtype=torch.int32))
        self._intermediate_bytes = intermediate * activation_bytes
        self._hidden = hidden
        self.row_bytes = hidden * FLOAT32_BYTES

    def read(self, num_routes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [N, H], float32, sorted by expert, and the row of each route [N], int32, in the order of the ids.

        Both are views of the scratch memory and hold until the next kernel call; they may be overwritten.

        Raises:
            ValueError: The memory is smaller than a call of so many routes leaves it.
        """
        words = self._scratchpad.words()
        if words is self._viewed and num_routes == self._views[1].shape[0]:
            return self._views
        per_route_bytes = _whole_lines(num_routes * INT32_BYTES)
        index_start = self._counts_bytes + per_route_bytes
        rows_start = index_start + per_route_bytes + _whole_lines(num_routes * self._intermediate_bytes)
        rows_end = rows_start + num_routes * self.row_bytes
        if rows_end > words.shape[0] * INT32_BYTES:
            raise ValueError(f"the scratch memory has {words.shape[0] * INT32_BYTES} bytes, {rows_end} were expected")
        rows = words[rows_start // FLOAT32_BYTES : rows_end // FLOAT32_BYTES].view(torch.float32)
        row_of_route_N = words[index_start // INT32_BYTES : index_start // INT32_BYTES + num_routes]
        self._viewed, self._views = words, (rows.view(num_routes, self._hidden), row_of_route_N)
        return self._views


def can_read(rows: KernelRows, layer: LayerFacts, hidden: int, dtype: torch.dtype) -> bool:
    """Whether rows as read are those that the layer's kernel returns for one expert at a time."""
    random = torch.Generator().manual_seed(0)
    x_TH = torch.randn(PROBE_TOKENS, hidden, generator=random, dtype=torch.float32).to(dtype)
    scores_TE = torch.rand(PROBE_TOKENS, layer.num_experts, generator=random, dtype=torch.float32)
    ids_TK = scores_TE.topk(layer.top_k, dim=1).indices.int()
    ones_TK = torch.ones(PROBE_TOKENS, layer.top_k, dtype=torch.float32)
    expected_NH = expert_rows(layer, x_TH, ones_TK, ids_TK).reshape(-1, hidden).float()
    try:
        # What an earlier call left must not pass for what this one leaves.
        rows.read(ids_TK.numel())[0].fill_(torch.nan)
        layer.forward_experts(x_TH, ones_TK.clone(), ids_TK)
        rows_NH, row_of_route_N = rows.read(ids_TK.numel())
    except ValueError:
        return False
    if not torch.equal(row_of_route_N.sort().values, torch.arange(ids_TK.numel(), dtype=torch.int32)):
        return False
    found_NH = rows_NH[row_of_route_N.long()]
    # The kernel rounds what it returns to the layer's dtype.
    tolerance = 2 * torch.finfo(dtype).eps
    return bool(torch.allclose(found_NH, expected_NH, rtol=tolerance, atol=tolerance * float(expected_NH.abs().max())))


def _ask_for_huge_pages(pointer: int, size_bytes: int) -> None:
    """Lets Linux back the memory by pages of 2 MB, if it will: reading through pages of 4 KB takes twice as long."""
    start = -(-pointer // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    length = (pointer + size_bytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if length > 0 and sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def _whole_lines(size_bytes: int) -> int:
    return (size_bytes + 63) // 64 * 64
