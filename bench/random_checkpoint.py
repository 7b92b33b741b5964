"""Checkpoints of random bytes and of any size, and plans for them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

NUM_EXPERTS = 64
HIDDEN, INTERMEDIATE = 2048, 768
SHARD_BYTES = 4 << 30
Shapes = dict[str, tuple[int, ...]]

CONFIG: Mapping[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": HIDDEN,
    "intermediate_size": 6144,
    "moe_intermediate_size": INTERMEDIATE,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def layer_shapes(layer: int, layout: str) -> Shapes:
    """Tensors of one layer as Qwen3-30B-A3B names them, with 64 experts."""
    root = f"model.layers.{layer}"
    shapes: Shapes = {
        f"{root}.input_layernorm.weight": (HIDDEN,),
        f"{root}.post_attention_layernorm.weight": (HIDDEN,),
        f"{root}.self_attn.q_proj.weight": (2048, HIDDEN),
        f"{root}.self_attn.k_proj.weight": (512, HIDDEN),
        f"{root}.self_attn.v_proj.weight": (512, HIDDEN),
        f"{root}.self_attn.o_proj.weight": (HIDDEN, 2048),
        f"{root}.self_attn.q_norm.weight": (128,),
        f"{root}.self_attn.k_norm.weight": (128,),
        f"{root}.mlp.gate.weight": (NUM_EXPERTS, HIDDEN),
    }
    if layout == "stacked":
        shapes[f"{root}.mlp.experts.gate_up_proj"] = (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        shapes[f"{root}.mlp.experts.down_proj"] = (NUM_EXPERTS, HIDDEN, INTERMEDIATE)
        return shapes
    for expert in range(NUM_EXPERTS):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            shape = (HIDDEN, INTERMEDIATE) if projection == "down_proj" else (INTERMEDIATE, HIDDEN)
            shapes[f"{root}.mlp.experts.{expert}.{projection}.weight"] = shape
    return shapes


def num_bytes(shape: Sequence[int]) -> int:
    """Bytes of a BF16 tensor."""
    size = 2
    for length in shape:
        size *= length
    return size


def make_checkpoint(directory: Path, gigabytes: float, layout: str) -> int:
    """Writes a checkpoint of random bytes, shard by shard; returns its number of layers."""
    directory.mkdir(parents=True)
    layer_bytes = sum(num_bytes(shape) for shape in layer_shapes(0, layout).values())
    num_layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    shapes: Shapes = {"model.embed_tokens.weight": (32000, HIDDEN)}
    for layer in range(num_layers):
        shapes.update(layer_shapes(layer, layout))
    shapes.update({"model.norm.weight": (HIDDEN,), "lm_head.weight": (32000, HIDDEN)})
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if sum(map(num_bytes, shards[-1].values())) + num_bytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    noise = os.urandom(8 << 20)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / file, shard, noise)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": sum(map(num_bytes, shapes.values()))}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": num_layers}))
    return num_layers


def write_shard(path: Path, shapes: Shapes, noise: bytes) -> None:
    """One safetensors file; exponents of the noise are tamed so that it loads as finite BF16."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + num_bytes(shape)]}
        offset += num_bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        while offset:
            offset -= handle.write(noise[: min(offset, len(noise))])
        os.fsync(handle.fileno())


def write_plan(path: Path, num_layers: int) -> None:
    """Every second expert stays: the worst case for runs of neighbours."""
    kept, dropped = list(range(0, NUM_EXPERTS, 2)), list(range(1, NUM_EXPERTS, 2))
    layers = [
        {"layer": f"model.layers.{index}.mlp.experts", "index": index, "kept": kept, "dropped": dropped}
        for index in range(num_layers)
    ]
    path.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "every second", "layers": layers}))
