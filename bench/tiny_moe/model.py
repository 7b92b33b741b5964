"""The model as it is trained: Qwen3-MoE with tokens sorted by expert.

Same computation as transformers' ``Qwen3MoeForCausalLM``; ``export.py`` renames its tensors and compares the logits.

Axes: B sequences, T tokens of a sequence, N = B * T tokens, H hidden, E experts, K experts of a token, I expert width,
L layers, V vocabulary, R rows (a token once for each of its experts, an expert's rows filled up to a multiple).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROW_MULTIPLE = 32  # Few distinct shapes, so that the kernels compiled for a shape are found again.


@dataclass(frozen=True, slots=True)
class TinyMoeConfig:
    """Shape of the model."""

    vocab_size: int = 4096
    hidden_size: int = 192
    num_layers: int = 4
    num_experts: int = 32
    top_k: int = 2
    expert_width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    max_positions: int = 2048


# The embedded model, and a second one for figures on many small experts (bench/paper).
SHAPES = {
    "top-2-of-32": TinyMoeConfig(),
    "top-8-of-64": TinyMoeConfig(hidden_size=128, num_layers=8, num_experts=64, top_k=8, expert_width=32),
}


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What one pass gives.

    Attributes:
        hidden_NH: Last hidden state of every token, normed; ``TinyMoe.logits`` takes it.
        balance_loss: Mean over the layers of E * sum_e(share of rows of e * mean probability of e); 1 is even.
        counts_LE: Tokens routed to each expert.
        expert_ids_LNK: Experts of every token.
    """

    hidden_NH: Tensor
    balance_loss: Tensor
    counts_LE: Tensor
    expert_ids_LNK: Tensor


class _GroupedLinear(torch.autograd.Function):
    """Multiplies the rows of each expert by that expert's matrix."""

    @staticmethod
    def forward(ctx: Any, rows_RX: Tensor, weights_EYX: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(rows_RX, weights_EYX)
        ctx.bounds = bounds
        output_RY = rows_RX.new_empty(rows_RX.shape[0], weights_EYX.shape[1])
        for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
            if end > start:
                torch.mm(rows_RX[start:end], weights_EYX[expert].t(), out=output_RY[start:end])
        return output_RY

    @staticmethod
    def backward(ctx: Any, grad_RY: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RX, weights_EYX = ctx.saved_tensors
        bounds = ctx.bounds
        grad_RY = grad_RY.contiguous()
        grad_rows_RX = torch.empty_like(rows_RX)
        grad_weights_EYX = torch.zeros_like(weights_EYX)
        for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
            if end > start:
                torch.mm(grad_RY[start:end], weights_EYX[expert], out=grad_rows_RX[start:end])
                torch.mm(grad_RY[start:end].t(), rows_RX[start:end], out=grad_weights_EYX[expert])
        return grad_rows_RX, grad_weights_EYX, None


_grouped_linear: Callable[[Tensor, Tensor, list[int]], Tensor] = _GroupedLinear.apply


class Experts(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.top_k, config.num_experts
        shape = (config.num_experts, 2 * config.expert_width, config.hidden_size)
        self.router_EH = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * 0.02)
        self.gate_up_EJH = nn.Parameter(torch.randn(shape) * 0.04)
        self.down_EHI = nn.Parameter(torch.randn(config.num_experts, config.hidden_size, config.expert_width) * 0.02)

    def forward(self, x_NH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gives the layer's output, its balance loss, the tokens of each expert and the experts of each token."""
        num_tokens = x_NH.shape[0]
        probabilities_NE = functional.softmax(functional.linear(x_NH.float(), self.router_EH), dim=-1)
        gates_NK, ids_NK = probabilities_NE.topk(self.top_k, dim=-1)
        gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True)

        flat_ids = ids_NK.flatten()
        counts_E = torch.bincount(flat_ids, minlength=self.num_experts)
        balance = self.num_experts * (counts_E / num_tokens * probabilities_NE.mean(0)).sum() / self.top_k

        order = flat_ids.argsort(stable=True)
        filled_E = (counts_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
        bounds = [0, *filled_E.cumsum(0).tolist()]
        shift_E = filled_E.cumsum(0) - filled_E - (counts_E.cumsum(0) - counts_E)
        row_of_sorted = torch.arange(len(order)) + shift_E[flat_ids[order]]
        row_of_choice = torch.empty_like(order).scatter_(0, order, row_of_sorted)
        token_of_row = torch.full((bounds[-1],), num_tokens).scatter_(
            0, row_of_choice, torch.arange(len(order)) // self.top_k
        )

        padded_x = functional.pad(x_NH.to(dtype), (0, 0, 0, 1))
        hidden_RJ = _grouped_linear(padded_x[token_of_row], self.gate_up_EJH.to(dtype), bounds)
        gate_RI, up_RI = hidden_RJ.chunk(2, dim=-1)
        output_RH = _grouped_linear(functional.silu(gate_RI) * up_RI, self.down_EHI.to(dtype), bounds)
        chosen_NKH = output_RH[row_of_choice].view(num_tokens, self.top_k, -1)
        output_NH = (chosen_NKH.float() * gates_NK.unsqueeze(-1)).sum(1)
        return output_NH, balance, counts_E, ids_NK


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys and rotary positions."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.qkv = nn.Parameter(torch.randn(width + 2 * kv_width, config.hidden_size) * 0.04)
        self.output = nn.Parameter(torch.randn(config.hidden_size, width) * 0.02)
        self.q_norm = nn.Parameter(torch.ones(config.head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.head_dim))

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """Attends to every earlier token of the sequence."""
        config = self.config
        num_sequences, num_tokens, _ = x_BTH.shape
        qkv = functional.linear(x_BTH.to(dtype), self.qkv.to(dtype)).view(
            num_sequences, num_tokens, -1, config.head_dim
        )
        q, k, v = torch.split(qkv, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
        q = _rotate(_norm(q, self.q_norm, config.norm_epsilon).transpose(1, 2), cos_TD, sin_TD).to(dtype)
        k = _rotate(_norm(k, self.k_norm, config.norm_epsilon).transpose(1, 2), cos_TD, sin_TD).to(dtype)
        repeats = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.transpose(1, 2).repeat_interleave(repeats, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(num_sequences, num_tokens, -1)
        return functional.linear(mixed, self.output.to(dtype)).float()


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _rotate(x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD


class Layer(nn.Module):
    """Attention and experts, each with a norm before it and a residual around it."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.attention_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.expert_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.attention = Attention(config)
        self.experts = Experts(config)


class TinyMoe(nn.Module):
    """The model: embedding, layers, norm, and the embedding again as output matrix.

    Args:
        config: Shape of the model.
        compute_dtype: dtype of the matrix products; parameters, residuals, norms and router stay float32.
    """

    def __init__(self, config: TinyMoeConfig, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding_VH = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.02)
        self.stack = tuple(Layer(config) for _ in range(config.num_layers))
        self.layers = nn.ModuleList(self.stack)
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_positions), frequencies).repeat(1, 2)
        self.cos_TD, self.sin_TD = angles.cos(), angles.sin()

    def forward(self, tokens_BT: Tensor) -> ForwardResult:
        """Runs the model over sequences that start at position 0."""
        epsilon, dtype = self.config.norm_epsilon, self.compute_dtype
        num_tokens = tokens_BT.shape[1]
        cos_TD, sin_TD = self.cos_TD[:num_tokens], self.sin_TD[:num_tokens]
        x_BTH = functional.embedding(tokens_BT, self.embedding_VH)
        balances, counts, ids = [], [], []
        for layer in self.stack:
            x_BTH = x_BTH + layer.attention(_norm(x_BTH, layer.attention_norm, epsilon), cos_TD, sin_TD, dtype)
            normed_NH = _norm(x_BTH, layer.expert_norm, epsilon).flatten(0, 1)
            output_NH, balance, counts_E, ids_NK = layer.experts(normed_NH, dtype)
            x_BTH = x_BTH + output_NH.view_as(x_BTH)
            balances.append(balance)
            counts.append(counts_E)
            ids.append(ids_NK)
        x_NH = _norm(x_BTH, self.final_norm, epsilon).flatten(0, 1)
        return ForwardResult(x_NH, torch.stack(balances).mean(), torch.stack(counts), torch.stack(ids))

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Gives ``[N, V]`` logits of last hidden states."""
        return functional.linear(hidden_NH.to(self.compute_dtype), self.embedding_VH.to(self.compute_dtype))
