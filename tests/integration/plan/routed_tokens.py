"""Routed tokens of the embedded model in transformers, as sums for the planner.

Axes: T tokens, K chosen experts, E experts, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from statistics_factory import header, window
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from reap_serve.model import Fingerprint, fingerprint, open_model
from reap_serve.statistics.record import PHASES, ExpertSums, Statistics

DIRECTORY = Path(str(resources.files("reap_serve.demo"))) / "tiny_moe"
DOMAINS = ("code", "prose", "german", "tools", "arithmetic")
SEQUENCE_TOKENS = 256
SEQUENCES = 8


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """What one layer saw.

    Attributes:
        hidden_TH: Inputs of the MoE block.
        gates_TK: Weights that the model applies.
        ids_TK: Chosen experts.
    """

    hidden_TH: torch.Tensor
    gates_TK: torch.Tensor
    ids_TK: torch.Tensor


def load_model() -> Qwen3MoeForCausalLM:
    """The embedded model in float32."""
    return Qwen3MoeForCausalLM.from_pretrained(DIRECTORY / "model", dtype=torch.float32).eval()


def token_ids(domain: str, sequences: int = SEQUENCES) -> torch.Tensor:
    """Sequences of a domain's calibration texts, packed: [sequences, SEQUENCE_TOKENS]."""
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY / "model")
    ids: list[int] = []
    for line in (DIRECTORY / "traffic" / f"{domain}.calibration.jsonl").read_text().splitlines():
        record = json.loads(line)
        answer = record["response"]["body"]["choices"][0]["message"]
        messages = [*record["body"]["messages"], answer]
        texts = [message.get("content") or json.dumps(message.get("tool_calls")) for message in messages]
        ids += tokenizer("\n".join(texts) + "\n")["input_ids"]
        if len(ids) >= sequences * SEQUENCE_TOKENS:
            break
    return torch.tensor(ids[: sequences * SEQUENCE_TOKENS]).reshape(sequences, SEQUENCE_TOKENS)


@torch.no_grad()
def observe(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> list[LayerTokens]:
    """What each layer saw of some sequences, one a row, one after another."""
    seen: list[list[LayerTokens]] = [[] for _ in model.model.layers]
    handles = []
    for parts, layer in zip(seen, model.model.layers, strict=True):

        def record(
            _: object,
            inputs: tuple[torch.Tensor, ...],
            output: tuple[torch.Tensor, ...],
            parts: list[LayerTokens] = parts,
        ) -> None:
            parts.append(LayerTokens(inputs[0], output[1], output[2]))

        handles.append(layer.mlp.gate.register_forward_hook(record))
    try:
        for row in ids:
            model(row[None])
    finally:
        for handle in handles:
            handle.remove()
    return [
        LayerTokens(*(torch.cat([getattr(part, name) for part in parts]) for name in LayerTokens.__slots__))
        for parts in seen
    ]


def expert_output(model: Qwen3MoeForCausalLM, layer: int, expert: int, hidden_TH: torch.Tensor) -> torch.Tensor:
    """f(x) of one expert, [T, H]."""
    experts = model.model.layers[layer].mlp.experts
    gate, up = torch.nn.functional.linear(hidden_TH, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, experts.down_proj[expert])


@torch.no_grad()
def statistics_of(model: Qwen3MoeForCausalLM, slices: Mapping[str, Sequence[LayerTokens]]) -> Statistics:
    """The sums that an observation of these tokens holds."""
    found: Fingerprint = fingerprint(open_model(str(DIRECTORY / "model")))
    shape = (len(slices), len(PHASES), found.num_layers, found.num_experts)
    counts = np.zeros(shape, np.int64)
    names = [name for name in ExpertSums.__dataclass_fields__ if name.endswith("SPLE") and name != "token_count_SPLE"]
    sums = {name: np.zeros(shape) for name in names[:7]}
    tokens = np.zeros(shape[:3], np.int64)
    for s, layers in enumerate(slices.values()):
        for at, layer in enumerate(layers):
            tokens[s, 0, at] = len(layer.hidden_TH)
            for expert in range(found.num_experts):
                row, slot = torch.where(layer.ids_TK == expert)
                g = layer.gates_TK[row, slot].double()
                f = expert_output(model, at, expert, layer.hidden_TH[row]).double()
                norm = torch.linalg.vector_norm(f, dim=-1)
                counts[s, 0, at, expert] = len(row)
                where = (s, 0, at, expert)
                sums["gate_sum_SPLE"][where] = g.sum()
                sums["norm_sum_SPLE"][where] = norm.sum()
                sums["norm_sq_sum_SPLE"][where] = (norm**2).sum()
                sums["weighted_norm_sum_SPLE"][where] = (g * norm).sum()
                sums["weighted_norm_sq_sum_SPLE"][where] = ((g * norm) ** 2).sum()
                if len(row):
                    sums["norm_max_SPLE"][where] = norm.max()
                    sums["activation_max_SPLE"][where] = f.abs().max()
    total = int(tokens.max())
    of = window("transformers", recorder="transformers", prompt_tokens=(total, total))
    return Statistics(header(found, tuple(slices), of), ExpertSums(token_count_SPLE=counts, **sums), tokens)
