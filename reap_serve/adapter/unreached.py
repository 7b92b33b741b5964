"""Fused experts that no tap reaches, refused when the model is loaded: their layer would be missing without a word."""

from __future__ import annotations

import torch

from reap_serve.adapter.tap import is_tapped, plain_class
from reap_serve.errors import EngineError

# Kernels that fuse the exchange between ranks with the experts: modules of the models, in no common class, told by the
# end of a name, their own or that of a class that they derive from.
MEGA_KERNEL = "MegaMoEExperts"
# What computes decode steps from the weights of a layer's experts, and does not call the layer: modules of models, or
# what hangs on one; with what switches it off.
_ASKED_FOR = "start vLLM without specialised decoding (--monokernel, decode_backend in the additional configuration)"
BYPASSES = {
    "FlintBf16DecodeMoE": "observe it with --tensor-parallel-size 2",
    "MonoDecodeLayer": _ASKED_FOR,
    "DecodeConfig": _ASKED_FOR,
}


def refuse_unreached(model: torch.nn.Module) -> None:
    """Refuses a model whose statistics would lack a layer, or would be of other experts than those that were run.

    Args:
        model: As vLLM built it, its weights in place.

    Raises:
        EngineError: Names the layer and its class.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    for name, module in model.named_modules():
        kind = type(module).__name__
        if any(base.__name__.endswith(MEGA_KERNEL) for base in type(module).__mro__):
            raise EngineError(f"{name} is a {kind}, which shows nothing of its experts", "start vLLM without mega MoE")
        for held in (kind, *(type(value).__name__ for value in vars(module).values())):
            if held in BYPASSES:
                raise EngineError(f"{name}: {held} computes decode steps past the layer", BYPASSES[held])
        if isinstance(module, (MoERunnerInterface, RoutedExperts)) and not is_tapped(module):
            raise EngineError(
                f"{name} is a {kind}, a layer of its own that observation does not reach",
                "this model cannot be observed",
            )
        if (
            isinstance(module, RoutedExperts)
            and plain_class(module).forward_modular is not RoutedExperts.forward_modular
        ):
            raise EngineError(
                f"{name} is a {plain_class(module).__name__}, which changes the choice of experts behind the router",
                "start vLLM without expert substitution",
            )
