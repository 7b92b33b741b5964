"""Writes a training checkpoint as a Hugging Face checkpoint, with the hub's tensor names, and proves it.

Run: ``python -m bench.tiny_moe.export --checkpoint FILE --data DIR --output DIR``.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from bench.tiny_moe.conversations import DOMAINS, Conversation
from bench.tiny_moe.model import SHAPES, TinyMoe, TinyMoeConfig
from bench.tiny_moe.sources import LICENCES
from bench.tiny_moe.tokenizer import END_OF_TEXT, END_OF_TURN
from bench.tiny_moe.train import BALANCE_COEFFICIENT, MIXTURE

LOGIT_TOLERANCE = 1e-3


def hub_tensors(model: TinyMoe) -> dict[str, Tensor]:
    """Gives the parameters under the names that the hub uses for Qwen3-MoE, one matrix for each expert."""
    config = model.config
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding_VH,
        "model.norm.weight": model.final_norm,
    }
    for number, layer in enumerate(model.stack):
        attention, experts = layer.attention, layer.experts
        q, k, v = torch.split(attention.qkv, [width, kv_width, kv_width])
        prefix = f"model.layers.{number}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": layer.attention_norm,
            f"{prefix}.post_attention_layernorm.weight": layer.expert_norm,
            f"{prefix}.self_attn.q_proj.weight": q,
            f"{prefix}.self_attn.k_proj.weight": k,
            f"{prefix}.self_attn.v_proj.weight": v,
            f"{prefix}.self_attn.o_proj.weight": attention.output,
            f"{prefix}.self_attn.q_norm.weight": attention.q_norm,
            f"{prefix}.self_attn.k_norm.weight": attention.k_norm,
            f"{prefix}.mlp.gate.weight": experts.router_EH,
        }
        for expert in range(config.num_experts):
            gate, up = experts.gate_up_EJH[expert].chunk(2)
            tensors[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = gate
            tensors[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = up
            tensors[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = experts.down_EHI[expert]
    return {name: tensor.detach().to(torch.bfloat16).contiguous().clone() for name, tensor in tensors.items()}


def hub_config(config: TinyMoeConfig, eos_token_id: int, pad_token_id: int) -> dict[str, object]:
    """Gives the content of ``config.json``."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": eos_token_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.expert_width * config.top_k,
        "max_position_embeddings": config.max_positions,
        "mlp_only_layers": [],
        "moe_intermediate_size": config.expert_width,
        "norm_topk_prob": True,
        "num_attention_heads": config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "output_router_logits": False,
        "pad_token_id": pad_token_id,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": BALANCE_COEFFICIENT,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def round_to_bfloat16(model: TinyMoe) -> None:
    """Gives the parameters the values that the exported file holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def largest_logit_difference(model: TinyMoe, folder: Path, texts: list[str]) -> float:
    """Compares float32 logits of the trained module with those of transformers on the exported checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    served = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.compute_dtype = torch.float32
    differences: list[float] = []
    with torch.no_grad():
        for text in texts:
            tokens_BT = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            ours = model.logits(model(tokens_BT).hidden_NH)
            differences.append(float((ours - served(tokens_BT).logits[0]).abs().max()))
    return max(differences)


def provenance(saved: dict[str, object], log: Path) -> dict[str, object]:
    """Gives the content of ``provenance.json``: what the checkpoint was made from."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    record = [record for record in records if record["step"] <= saved["step"]][-1]
    return {
        "recipe": "bench/tiny_moe",
        "seed": saved["seed"],
        "steps": saved["step"],
        "learning_rate_shares": saved["schedule"],
        "tokens": record["tokens"],
        "training_seconds": record["seconds"],
        "sequences_of_a_step": MIXTURE,
        "training_losses": record["losses"],
        "balance_loss": record["balance"],
        "torch": torch.__version__,
        "sources_and_licences": LICENCES,
    }


def main() -> None:
    """Writes ``model/`` and ``traffic/`` beside the output folder, checks them and renames them into place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    saved = torch.load(arguments.checkpoint, weights_only=False)
    model = TinyMoe(SHAPES[saved.get("shape", "top-2-of-32")])
    model.load_state_dict(saved["model"])
    round_to_bfloat16(model)

    arguments.output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=arguments.output, prefix=".new-"))
    folder = scratch / "model"
    shutil.copytree(arguments.data / "tokenizer", folder)
    shutil.copytree(arguments.data / "traffic", scratch / "traffic")
    save_file(hub_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos, pad = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    files = {
        "config.json": hub_config(model.config, eos, pad),
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [eos, pad],
            "pad_token_id": pad,
        },
        "provenance.json": provenance(saved, arguments.checkpoint.with_name("log.jsonl")),
    }
    os.chmod(folder / "model.safetensors", 0o644)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    texts = []
    for domain in DOMAINS:
        lines = (scratch / "traffic" / f"{domain}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
        texts += [Conversation.from_batch_line(line).text() for line in lines[:4]]
    difference = largest_logit_difference(model, folder, texts)
    print(f"largest difference of float32 logits to transformers: {difference:.2e}")
    if difference > LOGIT_TOLERANCE:
        raise SystemExit(f"the exported checkpoint differs by {difference:.2e} > {LOGIT_TOLERANCE:.0e}")
    for name in ("model", "traffic"):
        shutil.rmtree(arguments.output / name, ignore_errors=True)
        os.replace(scratch / name, arguments.output / name)
    scratch.rmdir()


if __name__ == "__main__":
    main()
