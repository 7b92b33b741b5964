"""Checkpoints with one planted damage each, and what transformers says of the same tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from reap_serve.traffic.teacher_forcing import ForcedTokens

Tensors = dict[str, torch.Tensor]


def damaged(model: Path, output: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of a checkpoint of one file, with its tensors changed in place."""
    shutil.copytree(model, output)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, output / "model.safetensors", {"format": "pt"}
    )
    return output


def permute_router(layer: int) -> Callable[[Tensors], None]:
    """Sends the tokens of a layer to other experts than its own: rows of the router in another order."""

    def change(tensors: Tensors) -> None:
        name = f"model.layers.{layer}.mlp.gate.weight"
        tensors[name] = tensors[name].roll(1, dims=0)

    return change


def zero_expert(layer: int, expert: int) -> Callable[[Tensors], None]:
    """Takes away what one expert adds."""
    return lambda tensors: _zero(tensors, f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight")


def repeat_forever(tensors: Tensors) -> None:
    """Leaves nothing but the embedding, which is tied to the output: the likeliest next token is the last one."""
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            _zero(tensors, name)


def _zero(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.zeros_like(tensors[name])


def load(model: Path) -> Any:
    """The model in transformers, in the checkpoint's precision."""
    from transformers import AutoModelForCausalLM

    # More threads than free cores wait for each other longer than this model computes.
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()


def answer_logprobs(model: Any, case: ForcedTokens) -> npt.NDArray[np.float64]:
    """Log-probabilities of the whole vocabulary in place of each answer token and of the end token, [N, V]."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([case.token_ids])).logits[0].double()
    first = case.prompt_tokens - 1
    last = len(case.token_ids) if case.end_token is not None else len(case.token_ids) - 1
    logprobs: npt.NDArray[np.float64] = torch.log_softmax(logits_TV[first:last], dim=-1).numpy()
    return logprobs


def answer_tokens(case: ForcedTokens) -> list[int]:
    """The tokens that `answer_logprobs` has rows for."""
    return [*case.token_ids[case.prompt_tokens :], *([] if case.end_token is None else [case.end_token])]


def expert_share_by_slice(model: Any, cases: Sequence[ForcedTokens]) -> dict[str, npt.NDArray[np.float64]]:
    """Share of a slice's answer tokens that each layer sends to each expert, [L, E], from the router logits."""
    top_k = model.config.num_experts_per_tok
    counts: dict[str, npt.NDArray[np.float64]] = {}
    for case in cases:
        with torch.inference_mode():
            logits = model(torch.tensor([case.token_ids]), output_router_logits=True).router_logits
        for layer, layer_logits in enumerate(logits):
            chosen = layer_logits[case.prompt_tokens - 1 :].topk(top_k, dim=-1).indices
            count = counts.setdefault(case.slice, np.zeros((len(logits), layer_logits.shape[-1])))
            count[layer] += np.bincount(chosen.flatten().numpy(), minlength=layer_logits.shape[-1])
    return {name: count / count.sum(axis=1, keepdims=True) for name, count in counts.items()}
