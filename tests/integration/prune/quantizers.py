"""Weight formats as published checkpoints store them: a quantiser and a dequantiser of each in plain PyTorch.

Only the layout matters here: rounding is to nearest, scales are absolute maxima. Legend: o rows, i columns of a weight.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

Tensors = dict[str, torch.Tensor]

# Columns that share a scale in NVFP4.
GROUP = 16
FP8_MAX = 448.0
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _blocks(weight: torch.Tensor, block: int) -> torch.Tensor:
    o, i = weight.shape
    return weight.reshape(o // block, block, i // block, block)


def quantize_fp8_block(weight: torch.Tensor, block: int) -> Tensors:
    """DeepSeek: F8_E4M3 [o, i], one F32 scale a block."""
    scale = _blocks(weight, block).abs().amax((1, 3)) / FP8_MAX
    scaled = _blocks(weight, block) / scale[:, None, :, None]
    return {"weight": scaled.reshape(weight.shape).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def dequantize_fp8_block(tensors: Tensors) -> torch.Tensor:
    weight, scale = tensors["weight"].float(), tensors["weight_scale_inv"]
    blocks = _blocks(weight, weight.shape[0] // scale.shape[0])
    return (blocks * scale[:, None, :, None]).reshape(weight.shape)


def quantize_fp8_tensor(weight: torch.Tensor) -> Tensors:
    """compressed-tensors, static: F8_E4M3, a scale a tensor, and an activation scale."""
    scale = weight.abs().max() / FP8_MAX
    quantized = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": quantized, "weight_scale": scale.reshape(1), "input_scale": torch.tensor([0.5])}


def dequantize_scaled(tensors: Tensors) -> torch.Tensor:
    return tensors["weight"].float() * tensors["weight_scale"].float()


def quantize_w8a8(weight: torch.Tensor) -> Tensors:
    """compressed-tensors: I8, one scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def quantize_w4a16(weight: torch.Tensor, group: int) -> Tensors:
    """compressed-tensors: eight 4-bit values an I32, a BF16 scale a group of columns."""
    o, i = weight.shape
    scale = (weight.reshape(o, i // group, group).abs().amax(2) / 7).bfloat16()
    values = (weight / scale.float().repeat_interleave(group, 1)).round().clamp(-8, 7).to(torch.int8)
    return {"weight_packed": pack_to_int32(values, 4), "weight_scale": scale, "weight_shape": torch.tensor([o, i])}


def dequantize_w4a16(tensors: Tensors) -> torch.Tensor:
    values, scale = (
        unpack_from_int32(tensors["weight_packed"], 4, torch.Size(tensors["weight_shape"].tolist())),
        tensors["weight_scale"].float(),
    )
    return values.float() * scale.repeat_interleave(values.shape[1] // scale.shape[1], 1)


def _to_fp4(weight: torch.Tensor) -> torch.Tensor:
    nearest = (weight.abs()[..., None] - FP4_VALUES).abs().argmin(-1)
    return FP4_VALUES[nearest] * torch.where(weight < 0, -1.0, 1.0)


def _nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    o, i = weight.shape
    second = weight.abs().max() / (6.0 * FP8_MAX)
    first = (weight.reshape(o, i // GROUP, GROUP).abs().amax(2) / 6.0 / second).to(torch.float8_e4m3fn)
    values = _to_fp4(weight / (first.float() * second).clamp_min(1e-12).repeat_interleave(GROUP, 1))
    return pack_fp4_to_uint8(values), first, second


def _from_nvfp4(packed: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    o, half = packed.shape
    values = unpack_fp4_from_uint8(packed, o, half * 2, torch.float32)
    return values * (first.float() * second).repeat_interleave(GROUP, 1)


def quantize_nvfp4_modelopt(weight: torch.Tensor) -> Tensors:
    """ModelOpt: two 4-bit values a U8, an F8 scale a group, scalar second scale and activation scale."""
    packed, first, second = _nvfp4(weight)
    return {"weight": packed, "weight_scale": first, "weight_scale_2": second, "input_scale": torch.tensor(0.01)}


def dequantize_nvfp4_modelopt(tensors: Tensors) -> torch.Tensor:
    return _from_nvfp4(tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"])


def quantize_nvfp4(weight: torch.Tensor) -> Tensors:
    """compressed-tensors: as ModelOpt, with reciprocal global scales of one element."""
    packed, first, second = _nvfp4(weight)
    return {
        "weight_packed": packed,
        "weight_scale": first,
        "weight_global_scale": (1 / second).reshape(1),
        "input_global_scale": torch.tensor([100.0]),
    }


def dequantize_nvfp4(tensors: Tensors) -> torch.Tensor:
    return _from_nvfp4(tensors["weight_packed"], tensors["weight_scale"], 1 / tensors["weight_global_scale"])


def _asymmetric(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values 0..15 [i, o], zeros [i/g, o], scales F16 [i/g, o] of the transposed weight."""
    transposed = weight.t().reshape(weight.shape[1] // group, group, weight.shape[0])
    low, high = transposed.amin(1), transposed.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    values = (transposed / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    return values.reshape(weight.t().shape).int(), zeros.int(), scales


def _pack(values: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    parts = values.long().unflatten(dim, (-1, 8)).unbind(dim + 1)
    packed = sum(parts[source] << (4 * place) for place, source in enumerate(order))
    return packed.where(packed < 2**31, packed - 2**32).int()


def _unpack(packed: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    parts = [packed >> (4 * order.index(source)) & 15 for source in range(8)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantize_awq(weight: torch.Tensor, group: int) -> Tensors:
    """AWQ: I32 [i, o/8] in interleaved order, zeros [i/g, o/8], F16 scales [i/g, o]."""
    values, zeros, scales = _asymmetric(weight, group)
    return {"qweight": _pack(values, 1, AWQ_ORDER), "qzeros": _pack(zeros, 1, AWQ_ORDER), "scales": scales}


def dequantize_awq(tensors: Tensors) -> torch.Tensor:
    values, zeros = (_unpack(tensors[name], 1, AWQ_ORDER).float() for name in ("qweight", "qzeros"))
    scales = tensors["scales"].float()
    group = values.shape[0] // scales.shape[0]
    return ((values - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).t().contiguous()


def quantize_gptq(weight: torch.Tensor, group: int) -> Tensors:
    """GPTQ with act-order: I32 [i/8, o], zeros [i/g, o/8], F16 scales [i/g, o], group of each column g_idx [i]."""
    values, zeros, scales = _asymmetric(weight, group)
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // group
    return {"qweight": _pack(values, 0), "qzeros": _pack(zeros, 1), "scales": scales, "g_idx": groups}


def dequantize_gptq(tensors: Tensors) -> torch.Tensor:
    values, zeros = _unpack(tensors["qweight"], 0).float(), _unpack(tensors["qzeros"], 1).float()
    groups = tensors["g_idx"].long()
    return ((values - zeros[groups]) * tensors["scales"].float()[groups]).t().contiguous()


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gpt-oss: [E, o, i] to blocks U8 [E, o, i/32, 16] and power-of-two scales U8 [E, o, i/32]."""
    groups = weight.unflatten(2, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(3).clamp_min(1e-12))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    code = (scaled.abs()[..., None] - FP4_VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8), (exponent + 127).to(torch.uint8)
