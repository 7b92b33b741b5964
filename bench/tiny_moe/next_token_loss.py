"""Weighted next-token loss, computed in blocks of tokens with its gradient, so that no full table of logits exists.

Axes: N tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_TOKENS = 512


class _BlockedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, embedding_VH: Tensor, targets_N: Tensor, weights_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden_low, embedding_low = hidden_NH.bfloat16(), embedding_VH.bfloat16()
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_embedding_VH = torch.zeros_like(embedding_VH)
        losses_N = torch.empty_like(weights_N)
        for start in range(0, len(targets_N), BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            targets = targets_N[block, None]
            logits = functional.linear(hidden_low[block], embedding_low).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses_N[block] = (normaliser - logits.gather(1, targets))[:, 0]
            weights = weights_N[block, None]
            grad = logits.sub_(normaliser).exp_().mul_(weights)
            grad = grad.scatter_add_(1, targets, -weights).bfloat16()
            grad_hidden_NH[block] = grad @ embedding_low
            grad_embedding_VH += grad.t() @ hidden_low[block]
        ctx.save_for_backward(grad_hidden_NH, grad_embedding_VH)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_NH, grad_embedding_VH = ctx.saved_tensors
        return grad_hidden_NH * grad_loss, grad_embedding_VH * grad_loss, None, None


def next_token_loss(
    hidden_NH: Tensor, embedding_VH: Tensor, targets_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives the weighted mean of the cross entropies and the cross entropy of every token.

    Products are in bfloat16, the softmax is in float32. Only the first result has a gradient.

    Args:
        hidden_NH: Last hidden states, float32.
        embedding_VH: Output matrix, float32.
        targets_N: Next tokens.
        weights_N: Weight of each token, float32; normalised here.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _BlockedLoss.apply
    loss, losses_N = apply(hidden_NH, embedding_VH, targets_N, weights_N / weights_N.sum())
    return loss, losses_N
