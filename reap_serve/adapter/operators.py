"""Operators of this package in vLLM's compiled graphs.

They are opaque to the compiler, their Python runs at every step. They are registered by schema:
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
    torch.library.register_fake(f"reap_serve::{name}", nothing, lib=_LIBRARY)


def nothing(*arguments: object) -> None:
    """What the operator gives while a graph is traced."""
