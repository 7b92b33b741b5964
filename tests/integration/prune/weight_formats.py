"""Checkpoints in each weight format, made from float32 ones and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import quantizers
import torch
from quantizers import Tensors
from safetensors.torch import load_file, save_file
from tiny_families import SMALL


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One weight format.

    Attributes:
        quantize: A weight [o, i] to its tensors by the name below the module.
        dequantize: And back, to float32.
        config: `quantization_config` of such checkpoints.
        files: Further files by name, such as ModelOpt's.
    """

    quantize: Callable[[torch.Tensor], Tensors]
    dequantize: Callable[[Tensors], torch.Tensor]
    config: Mapping[str, object]
    files: Mapping[str, object] = field(default_factory=dict)


# Modules outside the experts, as each format's configuration leaves them out.
OTHERS = ("lm_head", "re:.*self_attn.*", "re:.*mlp.gate$")
OTHERS_BY_NAME = (
    "lm_head",
    *(
        f"model.layers.{layer}.{module}"
        for layer in range(SMALL["num_hidden_layers"])
        for module in ("mlp.gate", *(f"self_attn.{name}_proj" for name in "qkvo"))
    ),
)
DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def _compressed(weights: Mapping[str, object], form: str, activations: object = None) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": list(OTHERS),
        "quantization_status": "compressed",
    }


def formats(block: int, group: int) -> Mapping[str, WeightFormat]:
    """Every format by name.

    Args:
        block: Rows and columns that share a scale in FP8.
        group: Columns that share a scale in W4A16, AWQ and GPTQ; 16 in NVFP4.
    """
    modelopt = {
        "quant_algo": "NVFP4",
        "group_size": quantizers.GROUP,
        "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"],
    }
    return {
        "fp8-block": WeightFormat(
            partial(quantizers.quantize_fp8_block, block=block),
            quantizers.dequantize_fp8_block,
            {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [block, block],
                "modules_to_not_convert": list(OTHERS_BY_NAME),
            },
        ),
        "fp8-tensor": WeightFormat(
            quantizers.quantize_fp8_tensor,
            quantizers.dequantize_scaled,
            _compressed({"num_bits": 8, "type": "float", "strategy": "tensor"}, "float-quantized"),
        ),
        "w8a8-int8": WeightFormat(
            quantizers.quantize_w8a8,
            quantizers.dequantize_scaled,
            _compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized", DYNAMIC_INT8),
        ),
        "w4a16": WeightFormat(
            partial(quantizers.quantize_w4a16, group=group),
            quantizers.dequantize_w4a16,
            _compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}, "pack-quantized"),
        ),
        "nvfp4": WeightFormat(
            quantizers.quantize_nvfp4,
            quantizers.dequantize_nvfp4,
            _compressed({"num_bits": 4, "type": "float", "strategy": "tensor_group"}, "nvfp4-pack-quantized"),
        ),
        "nvfp4-modelopt": WeightFormat(
            quantizers.quantize_nvfp4_modelopt,
            quantizers.dequantize_nvfp4_modelopt,
            {"quant_method": "modelopt", **modelopt},
            {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": modelopt}},
        ),
        "awq": WeightFormat(
            partial(quantizers.quantize_awq, group=group),
            quantizers.dequantize_awq,
            {
                "quant_method": "awq",
                "bits": 4,
                "group_size": group,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": list(OTHERS_BY_NAME),
            },
        ),
        "gptq": WeightFormat(
            partial(quantizers.quantize_gptq, group=group),
            quantizers.dequantize_gptq,
            {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": True},
        ),
    }


FORMATS = formats(16, 16)


def _rewrite(source: Path, target: Path, change: Callable[[Tensors], Tensors], config: Mapping[str, object]) -> None:
    tensors: Tensors = {}
    for file in sorted(source.glob("model*.safetensors")):
        tensors.update(load_file(file))
    target.mkdir()
    save_file(change(tensors), target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", target)


def quantize_checkpoint(source: Path, target: Path, form: WeightFormat, within: str = "") -> None:
    """Writes a checkpoint with every `_proj` quantised whose name contains `within`."""

    def change(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight") and within in name:
                module = name.removesuffix(".weight")
                result.update({f"{module}.{key}": value for key, value in form.quantize(tensor).items()})
            else:
                result[name] = tensor
        return {name: tensor.contiguous() for name, tensor in result.items()}

    config = json.loads((source / "config.json").read_text())
    _rewrite(source, target, change, {**config, "quantization_config": form.config})
    for name, content in form.files.items():
        (target / name).write_text(json.dumps(content))


def dequantize_checkpoint(source: Path, target: Path, form: WeightFormat, within: str = "") -> None:
    """Writes a float32 checkpoint from a quantised one."""
    keys = set(form.quantize(torch.ones(128, 128)))

    def change(tensors: Tensors) -> Tensors:
        modules: dict[str, Tensors] = {}
        result: Tensors = {}
        for name, tensor in tensors.items():
            module, _, key = name.rpartition(".")
            if module.endswith("_proj") and within in name and key in keys:
                modules.setdefault(module, {})[key] = tensor
            else:
                result[name] = tensor
        result.update({f"{module}.weight": form.dequantize(parts) for module, parts in modules.items()})
        return result

    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    _rewrite(source, target, change, config)


def mxfp4_checkpoint(source: Path, target: Path) -> None:
    """Writes gpt-oss with its experts in MXFP4, six stacked tensors a layer."""

    def change(tensors: Tensors) -> Tensors:
        for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
            # In memory [E, in, out]; MXFP4 stores [E, out, in/32, 16].
            blocks, scales = quantizers.quantize_mxfp4(tensors.pop(name).transpose(1, 2))
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks.contiguous(), scales.contiguous()
        return tensors

    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    config = json.loads((source / "config.json").read_text())
    _rewrite(source, target, change, {**config, "quantization_config": quantization})
