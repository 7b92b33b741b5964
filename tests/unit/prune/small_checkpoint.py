"""A qwen3_moe checkpoint of a few hundred bytes whose every byte says which expert and row it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

NUM_EXPERTS = 4
NUM_LAYERS = 2
Entry = tuple[str, Sequence[int], bytes]

CONFIG: Mapping[str, object] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": NUM_LAYERS,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
}


def safetensors_bytes(tensors: Mapping[str, Entry]) -> bytes:
    """A file in the safetensors format, written from its specification."""
    header: dict[str, object] = {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def read_back(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by the same specification."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }


def read_all(directory: Path) -> dict[str, Entry]:
    """The tensors of all weight files."""
    return {
        name: entry for path in sorted(directory.glob("model*.safetensors")) for name, entry in read_back(path).items()
    }


def expert_bytes(layer: int, expert: int, projection: int) -> bytes:
    """Six bytes that name their origin."""
    return bytes([layer, expert, projection, 0xA0 + layer, 0xB0 + expert, 0xC0 + projection])


def layer_tensors(layer: int) -> dict[str, Entry]:
    """The tensors of one layer."""
    prefix = f"model.layers.{layer}"
    tensors: dict[str, Entry] = {
        f"{prefix}.input_layernorm.weight": ("BF16", [2], bytes([1, layer, 2, layer])),
        f"{prefix}.mlp.gate.weight": ("BF16", [NUM_EXPERTS, 2], b"".join(bytes([expert] * 4) for expert in range(4))),
    }
    for expert in range(NUM_EXPERTS):
        for index, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
            name = f"{prefix}.mlp.experts.{expert}.{projection}.weight"
            tensors[name] = ("U8", [2, 3], expert_bytes(layer, expert, index))
    return tensors


def write_checkpoint(directory: Path, config: Mapping[str, object] = CONFIG) -> Path:
    """Writes the checkpoint as two files with an index, and what goes along."""
    directory.mkdir()
    files = {
        "model-00001-of-00002.safetensors": {
            "model.embed_tokens.weight": ("BF16", [1, 2], b"emb!"),
            **layer_tensors(0),
        },
        "model-00002-of-00002.safetensors": {**layer_tensors(1), "lm_head.weight": ("BF16", [1, 2], b"head")},
    }
    weight_map = {}
    for file, tensors in files.items():
        (directory / file).write_bytes(safetensors_bytes(tensors))
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": 1, "total_parameters": 1, "author": "a"}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "generation_config.json").write_text("{}")
    (directory / "LICENSE").write_text("licence")
    (directory / "modeling_own.py").write_text("remote = 1")
    return directory


def write_plan(path: Path, kept: Mapping[int, Sequence[int]], num_experts: int = NUM_EXPERTS) -> Path:
    """A hand-written plan."""
    layers = [
        {
            "layer": f"model.layers.{index}.mlp.experts",
            "index": index,
            "kept": list(ids),
            "dropped": [expert for expert in range(num_experts) if expert not in ids],
        }
        for index, ids in kept.items()
    ]
    path.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": layers}))
    return path
