"""Operators in vLLM's compiled graphs: those of this package, and what stands in for an operator during a step.

Operators of this package are opaque to the compiler, their Python runs at every step. They are registered by schema:
`torch.library.custom_op` would wrap each in 15 microseconds of Python of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("reap_serve", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, body: Callable[..., None]) -> None:
    """Registers `torch.ops.reap_serve.<name>`.

    Args:
        schema: Of an operator without a result, such as `name(Tensor(a!) written, Tensor read) -> ()`. What it writes,
            or claims to write, keeps it in the graph and in its place.
        body: What it does.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"reap_serve::{name}", _nothing, lib=_LIBRARY)


def _nothing(*arguments: object) -> None:
    """What the operator gives while a graph is traced."""


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

    def __init__(self, namespace: object, name: str, default: Callable[..., None] = _nothing) -> None:
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
