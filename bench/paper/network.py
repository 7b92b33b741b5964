"""The embedded model in plain PyTorch, float32, with each layer's experts and router exchangeable.

Axes: B sequences, T positions, N real tokens of a batch, H hidden, R router rows, C experts that exist, K experts per
token, I expert width, D head dimension, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's router and experts.

    Attributes:
        router_RH: Rows of the router.
        expert_of_row_R: Expert that each row leads to; the identity but for merged experts under a whole router.
        gate_CIH: First map into the units.
        up_CIH: Second.
        down_CHI: Map out of them.
    """

    router_RH: Tensor
    expert_of_row_R: Tensor
    gate_CIH: Tensor
    up_CIH: Tensor
    down_CHI: Tensor

    def apply(self, expert: int, x_NH: Tensor) -> Tensor:
        """The output of one expert."""
        gate_NI = functional.silu(functional.linear(x_NH, self.gate_CIH[expert]))
        return functional.linear(gate_NI * functional.linear(x_NH, self.up_CIH[expert]), self.down_CHI[expert])

    def apply_all(self, x_NH: Tensor) -> Tensor:
        """The outputs of all experts [C, N, H]."""
        gate_CNI = functional.silu(x_NH @ self.gate_CIH.transpose(1, 2))
        return (gate_CNI * (x_NH @ self.up_CIH.transpose(1, 2))) @ self.down_CHI.transpose(1, 2)

    def keep(self, kept: Sequence[int]) -> Experts:
        """The layer with these experts alone."""
        rows = torch.tensor(sorted(kept))
        return Experts(
            self.router_RH[rows],
            torch.arange(len(rows)),
            self.gate_CIH[rows],
            self.up_CIH[rows],
            self.down_CHI[rows],
        )


@dataclass(frozen=True, slots=True)
class Routed:
    """One call of a layer's experts: inputs, router logits, chosen rows, gates and outputs before weighting."""

    layer: int
    x_NH: Tensor
    logits_NR: Tensor
    rows_NK: Tensor
    gate_NK: Tensor
    output_NKH: Tensor


Watcher = Callable[[Routed], None]


class Network:
    """Runs sequences through the model.

    Args:
        directory: The checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        self._tensors = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
        self.num_layers: int = config["num_hidden_layers"]
        self.num_experts: int = config["num_experts"]
        self.top_k: int = config["num_experts_per_tok"]
        self._heads, self._kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self._head_dim, self._epsilon = config["head_dim"], config["rms_norm_eps"]
        frequency_D = config["rope_theta"] ** (-torch.arange(0, self._head_dim, 2) / self._head_dim)
        angle_TD = torch.outer(torch.arange(config["max_position_embeddings"]), frequency_D).repeat(1, 2)
        self._cos_TD, self._sin_TD = angle_TD.cos(), angle_TD.sin()
        self.layers = tuple(self._load_experts(layer) for layer in range(self.num_layers))

    def _load_experts(self, layer: int) -> Experts:
        prefix = f"model.layers.{layer}.mlp"

        def stacked(name: str) -> Tensor:
            names = (f"{prefix}.experts.{expert}.{name}_proj.weight" for expert in range(self.num_experts))
            return torch.stack([self._tensors.pop(each) for each in names])

        return Experts(
            self._tensors[f"{prefix}.gate.weight"],
            torch.arange(self.num_experts),
            stacked("gate"),
            stacked("up"),
            stacked("down"),
        )

    def hidden(
        self, tokens_BT: Tensor, real_BT: Tensor, layers: Sequence[Experts], watch: Watcher | None = None
    ) -> Tensor:
        """Last hidden states [N, H] of the real tokens, normed; padding follows a sequence, so that no token sees it.

        Args:
            tokens_BT: Token ids, padded on the right.
            real_BT: Which are no padding.
            layers: Experts of each layer.
            watch: Sees every layer's routed tokens.
        """
        x_BTH = functional.embedding(tokens_BT, self._tensors["model.embed_tokens.weight"])
        for index, experts in enumerate(layers):
            prefix = f"model.layers.{index}"
            normed = self._norm(x_BTH, f"{prefix}.input_layernorm.weight")
            x_BTH = x_BTH + self._attention(normed, f"{prefix}.self_attn")
            normed_NH = self._norm(x_BTH, f"{prefix}.post_attention_layernorm.weight")[real_BT]
            added_BTH = torch.zeros_like(x_BTH)
            added_BTH[real_BT] = self._mixture(normed_NH, experts, index, watch)
            x_BTH = x_BTH + added_BTH
        return self._norm(x_BTH, "model.norm.weight")[real_BT]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of last hidden states."""
        return functional.linear(hidden_NH, self._tensors["model.embed_tokens.weight"])

    @property
    def embedding(self) -> Tensor:
        """The embedding [V, H], which is the output matrix too."""
        return self._tensors["model.embed_tokens.weight"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._epsilon) * self._tensors[name]

    def _attention(self, x_BTH: Tensor, prefix: str) -> Tensor:
        num_sequences, length, _ = x_BTH.shape

        def heads(name: str) -> Tensor:
            projected = functional.linear(x_BTH, self._tensors[f"{prefix}.{name}_proj.weight"])
            return projected.view(num_sequences, length, -1, self._head_dim)

        cos_TD, sin_TD = self._cos_TD[:length], self._sin_TD[:length]
        q = _rotated(self._norm(heads("q"), f"{prefix}.q_norm.weight").transpose(1, 2), cos_TD, sin_TD)
        k = _rotated(self._norm(heads("k"), f"{prefix}.k_norm.weight").transpose(1, 2), cos_TD, sin_TD)
        mixed = functional.scaled_dot_product_attention(
            q, k, heads("v").transpose(1, 2), is_causal=True, enable_gqa=True
        )
        flat = mixed.transpose(1, 2).reshape(num_sequences, length, -1)
        return functional.linear(flat, self._tensors[f"{prefix}.o_proj.weight"])

    def _mixture(self, x_NH: Tensor, experts: Experts, layer: int, watch: Watcher | None) -> Tensor:
        logits_NR = functional.linear(x_NH, experts.router_RH)
        # The model renormalises the probabilities of the chosen: a softmax over the chosen logits.
        chosen_NK, rows_NK = logits_NR.topk(self.top_k, dim=-1)
        gate_NK = chosen_NK.softmax(dim=-1)
        flat = experts.expert_of_row_R[rows_NK].reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts.gate_CIH.shape[0]).tolist()
        sorted_x = x_NH[order // self.top_k]
        output = torch.empty_like(sorted_x)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                output[start : start + count] = experts.apply(expert, sorted_x[start : start + count])
                start += count
        output_NKH = torch.empty_like(output).index_copy_(0, order, output).view(*rows_NK.shape, -1)
        if watch is not None:
            watch(Routed(layer, x_NH, logits_NR, rows_NK, gate_NK, output_NKH))
        return (output_NKH * gate_NK.unsqueeze(-1)).sum(dim=1)


def _rotated(x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD
