"""The oracle: transformers in float32 with plain hooks, from which every sum is computed in float64.

Every family's module `*Experts` is called as `experts(x, ids, weights)`. Called with one column of ids and ones for
weights, it gives the output of a single expert for each token. Llama 4 alone differs: its experts get weighted inputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reap_serve.record.snapshot import RankSums
from reap_serve.statistics.record import PHASES

FIELDS = ("token_count", "gate_sum", "norm_sum", "norm_sq_sum", "weighted_norm_sum", "weighted_norm_sq_sum")
MAXIMA = ("norm_max", "activation_max")


@dataclass(frozen=True, slots=True)
class Served:
    """A sequence that entered the model: a prompt and what was answered, without the last token."""

    token_ids: list[int]
    slice: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Routed:
    """What one layer did with one sequence: ids [T, K], weights [T, K], outputs before weighting [T, K, H].

    `weighted_TKH` is what the model adds for each of them.
    """

    ids_TK: torch.Tensor
    gate_TK: torch.Tensor
    output_TKH: torch.Tensor
    weighted_TKH: torch.Tensor


def load(model: Path) -> Any:
    """The model in float32."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded.eval()


@torch.no_grad()
def run(model: Any, token_ids: Sequence[int]) -> dict[int, Routed]:
    """The routed experts of every layer, by the layer's index, for one sequence."""
    calls: dict[int, tuple[torch.nn.Module, tuple[torch.Tensor, ...]]] = {}
    handles = []
    for name, module in model.named_modules():
        index = re.search(r"layers\.(\d+)\.", name)
        if index is not None and type(module).__name__.endswith("Experts"):
            number = int(index.group(1))
            if type(module).__name__ == "Llama4TextExperts":
                router = model.get_submodule(name.removesuffix("experts") + "router")
                handles.append(router.register_forward_hook(_keep_scores(calls, number, module)))
            else:
                handles.append(module.register_forward_pre_hook(_keep_call(calls, number), with_kwargs=True))
    try:
        model(torch.tensor([list(token_ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {number: _unfuse(*call) for number, call in sorted(calls.items())}


def _keep_call(calls: dict[int, Any], number: int) -> Any:
    def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        calls[number] = (module, tuple(value.clone() for value in (*arguments, *named.values())))

    return hook


def _keep_scores(calls: dict[int, Any], number: int, experts: torch.nn.Module) -> Any:
    def hook(router: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        calls[number] = (experts, (arguments[0].clone(), output[0].clone()))

    return hook


@torch.no_grad()
def unfuse(model: Any, number: int, x_TH: torch.Tensor, gate_TK: torch.Tensor, ids_TK: torch.Tensor) -> Routed:
    """What the experts of layer `number` do with given inputs and routing."""
    for name, module in model.named_modules():
        if f"layers.{number}." in name and type(module).__name__.endswith("Experts"):
            return _unfuse(module, (x_TH.float(), ids_TK.long(), gate_TK.float()))
    raise KeyError(number)


def _unfuse(experts: torch.nn.Module, call: tuple[torch.Tensor, ...]) -> Routed:
    if len(call) == 2:
        return _unfuse_weighted_inputs(experts, *call)
    x_TH, ids_TK, gate_TK = call
    if gate_TK.shape != ids_TK.shape:
        gate_TK = gate_TK.gather(1, ids_TK)
    columns = [experts(x_TH, ids_TK[:, k : k + 1], torch.ones_like(gate_TK[:, :1])) for k in range(ids_TK.shape[1])]
    output_TKH = torch.stack(columns, dim=1)
    return Routed(ids_TK, gate_TK, output_TKH, output_TKH * gate_TK.unsqueeze(-1))


def _unfuse_weighted_inputs(experts: torch.nn.Module, x_TH: torch.Tensor, score_TE: torch.Tensor) -> Routed:
    gate_TK, ids_TK = score_TE.max(dim=1, keepdim=True)
    num_tokens, num_experts = score_TE.shape
    inputs = (x_TH * gate_TK).repeat(num_experts, 1)
    output_ETH = experts(inputs).view(num_experts, num_tokens, -1)
    output_TKH = output_ETH[ids_TK[:, 0], torch.arange(num_tokens)].unsqueeze(1)
    return Routed(ids_TK, gate_TK, output_TKH, output_TKH)


def sums(model: Any, sequences: Sequence[Served], slices: Sequence[str], num_experts: int) -> dict[str, np.ndarray]:
    """Every sum and maximum, axes [S, P, L, E], from the tokens that entered the model."""
    shape = (len(slices), len(PHASES), len(run(model, sequences[0].token_ids)), num_experts)
    total = {name: np.zeros(shape) for name in (*FIELDS, *MAXIMA)}
    for sequence in sequences:
        first_decoded = sequence.prompt_tokens
        for layer, routed in enumerate(run(model, sequence.token_ids).values()):
            for phase, tokens in enumerate((slice(first_decoded), slice(first_decoded, None))):
                add(total, (slices.index(sequence.slice), phase, layer), routed, tokens)
    return total


@torch.no_grad()
def vector_sums(model: Any, sequences: Sequence[Served], num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of f [L, E, H] and of z z' [L, E, E], z the router's logits, over all tokens that entered the model."""
    outputs: dict[int, np.ndarray] = {}
    grams: dict[int, np.ndarray] = {}
    for sequence in sequences:
        logits = model(torch.tensor([sequence.token_ids]), output_router_logits=True, use_cache=False).router_logits
        for layer, (routed, logits_TE) in enumerate(zip(run(model, sequence.token_ids).values(), logits, strict=True)):
            hidden = routed.output_TKH.shape[-1]
            total_EH = outputs.setdefault(layer, np.zeros((num_experts, hidden)))
            np.add.at(total_EH, routed.ids_TK.reshape(-1).numpy(), routed.output_TKH.double().reshape(-1, hidden))
            wide_TE = logits_TE.view(-1, num_experts).double().numpy()
            grams[layer] = grams.get(layer, 0.0) + wide_TE.T @ wide_TE
    return np.stack([outputs[layer] for layer in sorted(outputs)]), np.stack([grams[layer] for layer in sorted(grams)])


def add(total: dict[str, np.ndarray], place: tuple[int, ...], routed: Routed, tokens: slice) -> None:
    """Adds some tokens of one layer to the sums at a place of the leading axes."""
    norm_TK = routed.output_TKH[tokens].double().norm(dim=-1)
    weighted_TK = routed.weighted_TKH[tokens].double().norm(dim=-1)
    gate_TK = routed.gate_TK[tokens].double()
    values = (torch.ones_like(gate_TK), gate_TK, norm_TK, norm_TK**2, weighted_TK, weighted_TK**2)
    ids_N = routed.ids_TK[tokens].reshape(-1).numpy()
    for name, value_TK in zip(FIELDS, values, strict=True):
        np.add.at(total[name][place], ids_N, value_TK.reshape(-1).numpy())
    for name, value_TK in zip(MAXIMA, (norm_TK, routed.output_TKH[tokens].abs().amax(dim=-1)), strict=True):
        np.maximum.at(total[name][place], ids_N, value_TK.reshape(-1).numpy())


def assert_equal(observed: RankSums, expected: dict[str, np.ndarray], relative: float) -> None:
    """Counts are equal; every other sum differs by at most the given fraction.

    Args:
        observed: What the recorder measured.
        expected: The sums by name, axes [S, P, L, E], or [S, 1, L, E] when nothing was decoded.
        relative: The fraction.
    """
    phases = expected["token_count"].shape[1]
    assert not observed.sums_SPLEC[:, phases:].any()
    np.testing.assert_array_equal(observed.sums_SPLEC[:, :phases, ..., 0], expected["token_count"])
    for names, values in ((FIELDS, observed.sums_SPLEC), (MAXIMA, observed.maxima_SPLEC)):
        for column, name in enumerate(names):
            np.testing.assert_allclose(values[:, :phases, ..., column], expected[name], rtol=relative, err_msg=name)
