"""What stands under an operator's name in its place, so that a step pays only for the operators that it needs.

An operator of this package in each layer's graph runs Python at every step, whether or not it has anything to do.
Sparing it all steps makes a compiled engine of the demonstration model's shape 1.008 times as fast (95 % interval 1.005
to 1.011) where it is the routers' operator, and 1.011 times (1.008 to 1.015) where it is one behind each kernel, which
`tap_kernel` spares. On a model of hidden 2048 and two layers neither can be seen: 1.001 (0.994 to 1.008) and 0.997
(0.991 to 1.003). `python bench/observe_spared.py routing|kernel [--model large]`, on one core of an AMD EPYC.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from reap_serve.adapter.operators import nothing

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


class StandIn:
    """Stands under an operator's name in its place, between two calls of `enter` and `leave`.

    vLLM's eager code and the Python that inductor generates both look an operator up by its name at each call, as
    `torch.ops.<namespace>.<name>` and as its `.default`. While a graph is traced, the operator itself has to be there.

    Args:
        namespace: Such as `torch.ops.reap_serve`.
        name: Of the operator.
        default: Takes its arguments, by position.

    Attributes:
        entered: Whether it stands there.
    """

    def __init__(self, namespace: object, name: str, default: Callable[..., None] = nothing) -> None:
        self.entered = False
        self.default = default
        self.operator = getattr(namespace, name)
        self._namespace = namespace
        self._name = name

    def __call__(self, *arguments: object) -> None:
        self.default(*arguments)

    def enter(self) -> None:
        """Takes the operator's place."""
        setattr(self._namespace, self._name, self)
        self.entered = True

    def leave(self) -> None:
        """Gives the operator its place back."""
        setattr(self._namespace, self._name, self.operator)
        self.entered = False


@functools.cache
def routing_stand_in() -> StandIn:
    """What does nothing in the place of the routers' operator: one for all engines of a process, as the name is."""
    return StandIn(torch.ops.reap_serve, "mask_routing")


class SkippedRouting:
    """Spares the steps of a compiled engine without hooks the operator of its routers.

    Args:
        layers: The fused MoE layers of one engine; hooks are set in all of them or in none.
    """

    def __init__(self, layers: Sequence[MoERunner]) -> None:
        self._router = layers[0].router
        self._stand_in = routing_stand_in()

    def step_begins(self) -> None:
        """Puts what does nothing in the operator's place, or the operator back, until another engine's step."""
        if self._router.reap_routing is None:
            if not self._stand_in.entered:
                self._stand_in.enter()
        elif self._stand_in.entered:
            self._stand_in.leave()
