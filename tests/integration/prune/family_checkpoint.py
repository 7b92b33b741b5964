"""Writes the checkpoint of a tiny family, in the layout that transformers writes for the hub, with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tiny_families import SMALL, Family

# Sizes that vLLM's kernels for the CPU accept: heads of 32, MLA of 512 + 64.
SERVABLE: Mapping[str, object] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
SERVABLE_MLA: Mapping[str, object] = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


def build(
    family: Family, directory: Path, *, servable: bool = False, further: Mapping[str, object] | None = None
) -> None:
    """Writes the family's checkpoint, in shards of 40 kB so that layers spread over files.

    Args:
        family: The family.
        directory: Where to.
        servable: Larger sizes, and the keys of the hub's config.json that vLLM reads.
        further: Settings that come before all others.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {key: value for key, value in {**SMALL, **family.settings}.items() if value is not None}
    if servable:
        sizes = {**SERVABLE, **(SERVABLE_MLA if "kv_lora_rank" in settings else {})}
        settings.update({key: value for key, value in sizes.items() if key in settings})
        settings.update(family.servable)
    if family.text is not None:
        settings = {**family.settings, "text_config": {**SMALL, **family.text}}
    settings.update(further or {})
    config = transformers.AutoConfig.for_model(family.model_type, **settings)
    model = getattr(transformers, family.auto_class).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name or "per_expert_scale" in name:
                # Zeros and ones would hide a wrong order.
                tensor.add_(torch.randn_like(tensor) * 0.05)
            elif ("weight" in name and tensor.dim() > 1) or tensor.dim() == 3:
                tensor.normal_(std=0.05 if servable else 0.1)
    model.save_pretrained(directory, max_shard_size="400KB" if servable else "40KB")
    if servable:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **family.hub_config}))
