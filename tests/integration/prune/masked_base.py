"""The oracle: the base model in transformers, forbidden to choose the experts that a plan drops.

Logits of dropped experts become -1e9 where the router's linear map returns them, and so do their entries in a selection
bias; transformers' own code does all the rest. -1e9 and not -inf: phimoe divides by the logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NEVER = -1e9
ROUTER = re.compile(r"layers\.(\d+)\..*(gate|router)[\w.]*\.?weight$|layers\.(\d+)\..*(gate|router)\.weight$")
BIAS = re.compile(r"layers\.(\d+)\..*(correction_bias|expert_bias)$")


@contextmanager
def masked(model: nn.Module, dropped: Mapping[int, Sequence[int]], rows: int) -> Iterator[None]:
    """Masks the dropped experts of each layer.

    Args:
        model: The base.
        dropped: Dropped experts by layer.
        rows: Rows of a router.
    """
    routers = _routers(model, rows)
    assert set(routers.values()) == set(dropped), (routers, set(dropped))
    seen: set[int] = set()
    linear = nn.functional.linear

    def masking(inputs: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        result = linear(inputs, weight, *rest, **options)
        layer = routers.get(weight.data_ptr())
        if layer is not None and weight.shape[0] == rows:
            seen.add(layer)
            result[..., list(dropped[layer])] = NEVER
        return result

    saved = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (match := BIAS.search(name)) and tensor.shape[-1] == rows and int(match[1]) in dropped:
            saved.append((tensor, tensor.detach().clone()))
            tensor.data[..., list(dropped[int(match[1])])] = NEVER
    nn.functional.linear = masking
    try:
        yield
    finally:
        nn.functional.linear = linear
        for tensor, value in saved:
            tensor.data.copy_(value)
    assert seen == set(dropped), f"routers of {set(dropped) - seen} were never called"


def _routers(model: nn.Module, rows: int) -> dict[int, int]:
    found = {}
    for name, weight in model.named_parameters():
        match = ROUTER.search(name)
        if match and weight.dim() == 2 and weight.shape[0] == rows:
            found[weight.data_ptr()] = int(match[1] or match[3])
    return found
