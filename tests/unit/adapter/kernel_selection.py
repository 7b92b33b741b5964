"""vLLM's own choice of an MoE kernel, on a stand-in for a platform that is not here.

The object `current_platform`, which vLLM's modules hold, changes its class for a while; what asks whether a library is
installed is told yes. Everything else is vLLM: the order of its backends, the classes, what they say they support.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

# Shapes of Qwen3-30B-A3B; gpt-oss has biases and an activation of its own, Kimi-K2 the router of DeepSeek-V3.
NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768

PLATFORMS = {"SM90": ("CUDA", (9, 0)), "SM100": ("CUDA", (10, 0)), "gfx942": ("ROCM", (9, 4))}
# Tensor-parallel ranks, data-parallel ranks, expert parallelism.
LAYOUTS = {"TP1": (1, 1, False), "TP4": (4, 1, False), "EP8": (8, 1, True), "DP8 EP": (1, 8, True)}
INSTALLED_ON_CUDA = ("has_deep_gemm", "is_deep_gemm_supported", "is_flashinfer_mxint4_moe_available")
CUTLASS = ("cutlass_fp8_supported", "cutlass_group_gemm_supported", "cutlass_block_fp8_supported")
GFX942 = {"on_gfx942", "on_gfx9", "on_mi3xx"}


@dataclass(frozen=True, slots=True)
class Format:
    """A format of expert weights: how vLLM's selection is asked for it."""

    name: str
    select: Callable[[Any], Any]
    config: dict[str, Any]


def formats() -> list[Format]:
    """The formats of the table."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int_wna16, mxfp4, nvfp4, unquantized
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    def four_bits(key: Any, group_size: int) -> Callable[[Any], Any]:
        scheme = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
        return lambda config: int_wna16.select_wna16_moe_backend(config, key, scheme, False, False)

    # vLLM's scheme for compressed-tensors allows its own CUTLASS kernels, Fp8Config does not.
    fp8_block, fp8_tensor = (
        (keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym, False),
        (keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym, True),
    )
    gpt_oss = {"activation": MoEActivation.SWIGLUOAI, "hidden_dim": 3072, "intermediate_size": 3072, "has_bias": True}
    return [
        Format("bf16", unquantized.select_unquantized_moe_backend, {}),
        Format("FP8 block", lambda config: fp8.select_fp8_moe_backend(config, *fp8_block), {}),
        Format("FP8 tensor", lambda config: fp8.select_fp8_moe_backend(config, *fp8_tensor), {}),
        Format(
            "NVFP4",
            lambda config: nvfp4.select_nvfp4_moe_backend(config, keys.kNvfp4Static, keys.kNvfp4Dynamic),
            {},
        ),
        Format("MXFP4 gpt-oss", mxfp4.select_mxfp4_moe_backend, gpt_oss),
        Format(
            "MXFP4 DeepSeek-V4",
            mxfp4.select_deepseek_v4_mxfp4_moe_backend,
            {"routing_method": RoutingMethodType.DeepseekV4},
        ),
        Format("W4A16 g128", four_bits(keys.kInt4Static, 128), {}),
        Format(
            "W4A16 g32",
            four_bits(keys.kInt4Static32, 32),
            {"routing_method": RoutingMethodType.DeepSeekV3, "num_experts": 384, "num_logical_experts": 384},
        ),
    ]


def choose(fmt: Format, layout: str, backend: str = "auto") -> type:
    """The class of the kernel that vLLM takes for a format in a layout.

    Raises:
        Exception: What vLLM raises when no kernel is left.
    """
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    tensor_ranks, data_ranks, experts_parallel = LAYOUTS[layout]
    ranks = tensor_ranks * data_ranks
    parallel = FusedMoEParallelConfig(
        tp_size=1 if experts_parallel else ranks,
        pcp_size=1,
        dp_size=data_ranks,
        ep_size=ranks if experts_parallel else 1,
        tp_rank=0,
        pcp_rank=0,
        dp_rank=0,
        ep_rank=0,
        sp_size=1,
        use_ep=experts_parallel,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    facts: dict[str, Any] = {
        "num_experts": NUM_EXPERTS,
        "experts_per_token": TOP_K,
        "hidden_dim": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_logical_experts": NUM_EXPERTS,
        "activation": MoEActivation.SILU,
        "device": "cuda",
        "routing_method": RoutingMethodType.RenormalizeNaive,
        "moe_parallel_config": parallel,
        "in_dtype": torch.bfloat16,
        "moe_backend": backend,
        **fmt.config,
    }
    config = FusedMoEConfig(num_local_experts=facts["num_experts"] // parallel.ep_size, **facts)
    chosen: type = fmt.select(config)[1]
    return chosen


def import_all_experts() -> None:
    """Imports every kernel's module, on the platform that is really here."""
    from vllm.model_executor.layers.fused_moe import experts
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int_wna16, mxfp4, nvfp4, unquantized  # noqa: F401

    for module in pkgutil.iter_modules(experts.__path__):
        importlib.import_module(f"{experts.__name__}.{module.name}")


@contextlib.contextmanager
def standing_in(name: str) -> Iterator[None]:
    """vLLM believes to be on the platform of that name, with every library of its vendor installed."""
    import vllm.utils.flashinfer as flashinfer
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4
    from vllm.platforms import current_platform

    import_all_experts()
    vendor, _ = PLATFORMS[name]
    cuda = vendor == "CUDA"
    asked = dict.fromkeys((*INSTALLED_ON_CUDA, *CUTLASS), cuda) | {"has_triton_kernels": True}
    asked |= {each: cuda for each in vars(flashinfer) if each.startswith("has_flashinfer")}
    unconfigured = SimpleNamespace(model_config=SimpleNamespace(quantization_config=None))
    plain = type(current_platform)
    with contextlib.ExitStack() as stack:
        for module in [each for each in sys.modules.values() if getattr(each, "__name__", "").startswith("vllm.")]:
            for each in asked.keys() & vars(module).keys():
                stack.enter_context(patch.object(module, each, _answering(asked[each])))
        stack.enter_context(patch.object(mxfp4, "get_current_vllm_config", lambda: unconfigured))
        if not cuda:
            stack.enter_context(patch.dict(sys.modules, {"vllm.platforms.rocm": _rocm()}))
        current_platform.__class__ = _platform(name)
        try:
            yield
        finally:
            current_platform.__class__ = plain


def _answering(value: bool) -> Callable[..., bool]:
    return lambda *arguments, **named: value


def _platform(name: str) -> type:
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    vendor, capability = PLATFORMS[name]

    class StandIn(Platform):
        _enum = PlatformEnum[vendor]
        device_name, device_type, dispatch_key = name, "cuda", "CUDA"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

        @classmethod
        def supports_fp8(cls) -> bool:
            return True

        @classmethod
        def support_deep_gemm(cls) -> bool:
            return vendor == "CUDA"

    return StandIn


def _rocm() -> types.ModuleType:
    """The module that tells AMD's architectures apart; its own import asks the driver."""
    module = types.ModuleType("vllm.platforms.rocm")
    # PEP 562: any question of the kind "is this a gfx950?".
    vars(module)["__getattr__"] = lambda name: _answering(name in GFX942)
    return module
