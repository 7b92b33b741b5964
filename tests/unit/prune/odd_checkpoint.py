"""Small checkpoints of the kinds that users bring: quantised, under other roots, with odd companions."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from small_checkpoint import Entry, read_back, safetensors_bytes, write_plan

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1}
CONFIG: Mapping[str, object] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 16,
    "moe_intermediate_size": 8,
}
QWEN35: Mapping[str, object] = {
    "model_type": "qwen3_5_moe",
    "text_config": {**CONFIG, "model_type": "qwen3_5_moe_text", "mtp_num_hidden_layers": 1},
}
KEPT: Mapping[int, Sequence[int]] = {0: [0, 2, 5, 7], 1: [1, 2, 3, 6]}
# Where the experts of both layers are, and modules of two: one goes, one stays under another number.
L0, L1 = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
BOTH = [f"{L0}.3.up_proj", f"{L0}.5.up_proj"]
Tensors = dict[str, Entry]
Linear = Callable[[str, tuple[int, int]], Tensors]


def tensor(name: str, dtype: str, *shape: int, values: bytes | None = None) -> Entry:
    """A tensor whose bytes follow from its name; no byte is 0xFF or 0x7F, so that no number of it is NaN."""
    size = math.prod(shape) * BYTES[dtype]
    if values is None:
        parts = (hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(size // 32 + 1))
        values = bytes(byte & 0x3F for byte in b"".join(parts)[:size])
    assert len(values) == size, name
    return dtype, shape, values


def number(value: float) -> Entry:
    return "F32", (), struct.pack("<f", value)


def plain(name: str, shape: tuple[int, int]) -> Tensors:
    return {f"{name}.weight": tensor(name, "BF16", *shape)}


def packed(name: str, shape: tuple[int, int]) -> Tensors:
    """compressed-tensors, 4 bits, eight to an int32."""
    return {
        f"{name}.weight_packed": tensor(f"{name}p", "I32", shape[0], shape[1] // 8),
        f"{name}.weight_scale": tensor(f"{name}s", "BF16", shape[0], 1),
        f"{name}.weight_shape": ("I64", (2,), struct.pack("<2q", *shape)),
    }


def gptq(name: str, shape: tuple[int, int]) -> Tensors:
    return {
        f"{name}.qweight": tensor(f"{name}q", "I32", shape[1] // 8, shape[0]),
        f"{name}.qzeros": tensor(f"{name}z", "I32", 1, shape[0] // 8),
        f"{name}.scales": tensor(f"{name}s", "F16", 1, shape[0]),
        f"{name}.g_idx": tensor(f"{name}g", "I32", shape[1]),
    }


def nvfp4(name: str, shape: tuple[int, int]) -> Tensors:
    return {
        f"{name}.weight": tensor(name, "U8", shape[0], shape[1] // 2),
        f"{name}.weight_scale": tensor(f"{name}s", "F8_E4M3", shape[0], 1),
        f"{name}.weight_scale_2": number(0.5),
        f"{name}.input_scale": number(1.0),
    }


def dense(root: str = "model") -> Tensors:
    return {
        f"{root}.embed_tokens.weight": tensor("e", "BF16", 64, 16),
        **{f"{root}.layers.{layer}.self_attn.q_proj.weight": tensor(f"q{layer}", "BF16", 16, 16) for layer in (0, 1)},
    }


def block(base: str, experts: int = 8, linear: Linear = plain, *, router: bool = True) -> Tensors:
    """Router and experts below a module."""
    found = {f"{base}.gate.weight": tensor(base, "BF16", experts, 16)} if router else {}
    for expert in range(experts):
        for projection, shape in (("gate_proj", (8, 16)), ("up_proj", (8, 16)), ("down_proj", (16, 8))):
            found.update(linear(f"{base}.experts.{expert}.{projection}", shape))
    return found


def trunk(root: str = "model", linear: Linear = plain, *, router: bool = True, experts: int = 8) -> Tensors:
    return {k: v for i in (0, 1) for k, v in block(f"{root}.layers.{i}.mlp", experts, linear, router=router).items()}


def write(folder: Path, config: Mapping[str, object], tensors: Tensors, shards: int = 1) -> Path:
    """A checkpoint in one file, or in several with an index; and a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    names, weight_map = list(tensors), {}
    for index in range(shards):
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}))
        weight_map.update(dict.fromkeys(part, file))
    size = sum(len(data) for _, _, data in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    return folder


def plan(path: Path, kept: Mapping[int, Sequence[int]] = KEPT) -> Path:
    return write_plan(path, kept, num_experts=8)


def read(folder: Path) -> Tensors:
    """The tensors of all weight files."""
    return {
        name: entry for path in sorted(folder.glob("model*.safetensors")) for name, entry in read_back(path).items()
    }


def rows(entry: Entry, ids: Iterable[int]) -> bytes:
    """Some rows of a tensor."""
    size = len(entry[2]) // entry[1][0]
    return b"".join(entry[2][row * size : (row + 1) * size] for row in ids)
