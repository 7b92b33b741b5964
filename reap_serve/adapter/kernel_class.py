"""What a kernel of vLLM's is, by its class, and how it takes calls that are not the layer's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from reap_serve.adapter.releases.check import attribute_or_none


def adds_rows_apart(kernel: type) -> bool:
    """Whether a kernel of this class writes weighted rows and adds them in its method `moe_sum`."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import BatchedMarlinExperts, MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    return issubclass(kernel, (TritonExperts, MarlinExperts)) and not issubclass(kernel, BatchedMarlinExperts)


def is_monolithic(kernel: type) -> bool:
    """Whether a kernel of this class routes inside itself."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsMonolithic

    return issubclass(kernel, FusedMoEExpertsMonolithic)


@contextlib.contextmanager
def columns_of(kernel: Any, columns: int) -> Iterator[None]:
    """Some kernels take the number of experts per token from the layer and not from the ids: tells them another one.

    Args:
        kernel: vLLM's `FusedMoEKernel`, None for a method that has none.
        columns: Columns of the ids in the calls that follow.
    """
    experts: Any = None if kernel is None else kernel.fused_experts
    plain = None if experts is None else attribute_or_none(experts, "topk")
    if not isinstance(plain, int) or plain == columns:
        yield
        return
    experts.topk = columns
    try:
        yield
    finally:
        experts.topk = plain


@contextlib.contextmanager
def finalized(config: Any) -> Iterator[None]:
    """Some layers leave the sum over a token's experts to the layer behind them: has them add it up.

    Args:
        config: vLLM's `FusedMoEConfig`, which the kernel asks at each call.
    """
    deferred = config._defer_moe_finalize
    config._defer_moe_finalize = False
    try:
        yield
    finally:
        config._defer_moe_finalize = deferred
