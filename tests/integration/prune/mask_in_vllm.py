"""The oracle inside vLLM: its own router, forbidden to choose the experts that a plan drops.

Router logits of dropped experts become -1e9, and so do their entries in a selection bias; vLLM's own code does all the
rest. -1e9 and not -inf: phimoe divides by the logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from vllm import LLM
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

NEVER = -1e9
LAYER = re.compile(r"layers\.(\d+)\.")


@contextmanager
def masked(llm: LLM, dropped: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Masks the dropped experts of each layer of an engine in this process.

    Args:
        llm: The engine.
        dropped: Dropped experts by layer, an integer as JSON writes it; empty masks nothing.
    """
    modules = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    routers = {LAYER.search(name)[1]: each.router for name, each in modules.items() if isinstance(each, MoERunner)}
    assert set(dropped) <= set(routers), (set(dropped), set(routers))
    called: set[str] = set()
    with ExitStack() as stack:
        for layer, experts in dropped.items():
            router = routers[layer]
            masking = _masking(router._compute_routing, list(experts), lambda layer=layer: called.add(layer))
            stack.enter_context(patch.object(router, "_compute_routing", masking))
            bias = router.e_score_correction_bias
            if bias is not None:
                value = bias.detach().clone()
                value[list(experts)] = NEVER
                stack.enter_context(patch.object(router, "e_score_correction_bias", value))
        yield
    assert called == set(dropped), f"routers of {set(dropped) - called} were never called"


def _masking(compute: Callable[..., Any], experts: list[int], note: Callable[[], None]) -> Callable[..., Any]:
    def masking(hidden_states: torch.Tensor, router_logits: torch.Tensor, *rest: Any, **options: Any) -> Any:
        note()
        logits = router_logits.clone()
        logits[:, experts] = NEVER
        return compute(hidden_states, logits, *rest, **options)

    return masking
