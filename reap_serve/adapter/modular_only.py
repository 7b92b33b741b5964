"""Keeps vLLM from choosing monolithic kernels where an engine observes.

A monolithic kernel routes inside itself: neither gate weights nor the rows of single experts leave it. vLLM keeps a
modular kernel for nearly every format, and takes it when the monolithic classes answer that they do not support the
layer. So in an engine that observes they answer that. The modular kernel computes the same function; it rounds
differently, and its speed differs.

On a CPU the formats that have a monolithic kernel have no other: there vLLM chooses as always, and `refusals` refuses.

Not yet run on a GPU: tried with vLLM's own selection on stand-in platforms (tests/unit/adapter/kernel_selection.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from reap_serve.adapter import layer_view
from reap_serve.adapter.fit import settings_of
from reap_serve.shown_text import shown_logger

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

logger = shown_logger("reap_serve")

REASON = (
    "routing inside the kernel, which reap-serve cannot observe (leave --moe-backend out, "
    "or run vllm serve, which observes nothing)"
)

_passed_over: dict[str, None] = {}


def passed_over() -> tuple[str, ...]:
    """Monolithic kernels of this process that vLLM would have taken, in the order in which it asked for them."""
    return tuple(_passed_over)


def tell(layers: Sequence[MoERunner]) -> None:
    """Logs which kernels stand in for those that vLLM would have taken."""
    if _passed_over:
        kernels = ", ".join(dict.fromkeys(map(layer_view.kernel_name, layers)))
        logger.warning(
            "the experts run in %s, which can be observed, in place of %s; --keep-kernel keeps vLLM's choice and "
            "refuses observation",
            kernels,
            ", ".join(_passed_over),
        )


def building_observed_layer() -> bool:
    """Whether the layer that is being built belongs to an engine that observes, and that may change its kernel."""
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    settings = None if vllm_config is None else settings_of(vllm_config)
    return settings is not None and not settings.keep_kernel


def answer_for_monolithic(observes: Callable[[], bool] = building_observed_layer) -> None:
    """Lets monolithic kernels answer that they support nothing, once a process.

    Args:
        observes: Whether the layer that is being built belongs to an engine that observes and may change its kernel.
    """
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.platforms import current_platform

    if hasattr(FusedMoEExperts.is_supported_config, "__wrapped__"):
        return
    # Every class that overrides this asks it first: a test goes through all monolithic ones.
    plain = FusedMoEExperts.is_supported_config

    @functools.wraps(plain)
    def is_supported_config(cls: type[FusedMoEExperts], *arguments: Any, **named: Any) -> tuple[bool, str | None]:
        supported, reason = plain(cls, *arguments, **named)
        if supported and cls.is_monolithic() and not current_platform.is_cpu() and observes():
            _passed_over[cls.__name__] = None
            return False, REASON
        return supported, reason

    FusedMoEExperts.is_supported_config = staticmethod(is_supported_config)
