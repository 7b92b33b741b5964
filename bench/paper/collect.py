"""One calibration sample through the model: the statistics that the product's criteria and merging methods take, and
what the candidates of `candidates.py` take besides.

Axes: L layers, E experts, N tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.paper.network import Experts, Network, Routed
from bench.paper.traffic import Request, batches
from reap_serve.model import Fingerprint
from reap_serve.records import provenance
from reap_serve.statistics.record import SCHEMA_VERSION, ExpertSums, Header, Layer, Statistics, Window


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """One layer's tokens of a sample: inputs [N, H], router logits [N, E], and the slice (domain) of each."""

    x_NH: Tensor
    logits_NE: Tensor
    slice_N: Tensor


@dataclass(frozen=True, slots=True)
class Collected:
    """What a sample gave."""

    statistics: Statistics
    tokens: tuple[LayerTokens, ...]


@torch.no_grad()
def collect(network: Network, sequences: Sequence[Request], layers: Sequence[Experts] | None = None) -> Collected:
    """Runs a sample through the model.

    Args:
        network: The model.
        sequences: The sample.
        layers: Experts of each layer, each with a router row of its own; None is the unchanged model.
    """
    layers = layers or network.layers
    num_experts = layers[0].router_RH.shape[0]
    domains = tuple(sorted({sequence.domain for sequence in sequences}))
    shape = (len(domains), 2, network.num_layers, num_experts)
    hidden = network.embedding.shape[1]
    sums = {name: np.zeros(shape) for name in _COLUMNS}
    output_sum = np.zeros((*shape, hidden))
    gram = np.zeros((*shape, num_experts))
    maxima = {name: np.zeros(shape) for name in ("norm_max", "activation_max")}
    layer_tokens = np.zeros((len(domains), 2, network.num_layers), np.int64)
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(network.num_layers)]
    number = 0

    def watch(call: Routed) -> None:
        place = (number, 0, call.layer)
        layer_tokens[place] += call.x_NH.shape[0]
        ids = call.rows_NK.reshape(-1).numpy()
        norm, gate = call.output_NKH.double().norm(dim=-1).reshape(-1), call.gate_NK.double().reshape(-1)
        values = (torch.ones_like(gate), gate, norm, norm**2, gate * norm, (gate * norm) ** 2)
        for name, value in zip(_COLUMNS, values, strict=True):
            np.add.at(sums[name][place], ids, value.numpy())
        np.add.at(output_sum[place], ids, call.output_NKH.double().flatten(0, 1).numpy())
        np.maximum.at(maxima["norm_max"][place], ids, norm.numpy())
        np.maximum.at(maxima["activation_max"][place], ids, call.output_NKH.abs().amax(-1).reshape(-1).numpy())
        logits = call.logits_NR.double()
        gram[place] += (logits.T @ logits).numpy()
        seen[call.layer].append((call.x_NH, call.logits_NR, torch.full((call.x_NH.shape[0],), number)))

    for number, domain in enumerate(domains):  # noqa: B007 - `watch` reads it
        for batch in batches([sequence for sequence in sequences if sequence.domain == domain]):
            network.hidden(batch.tokens_BT, batch.real_BT, layers, watch)
    counts = sums.pop("token_count").astype(np.int64)
    expert_sums = ExpertSums(
        counts,
        *(sums[name] for name in _COLUMNS[1:]),
        maxima["norm_max"],
        maxima["activation_max"],
        output_sum_SPLEH=output_sum,
        logit_gram_SPLEE=gram,
    )
    return Collected(
        Statistics(_header(network, num_experts, domains, len(sequences)), expert_sums, layer_tokens),
        tuple(LayerTokens(*(torch.cat(parts) for parts in zip(*calls, strict=True))) for calls in seen),
    )


_COLUMNS = ("token_count", "gate_sum", "norm_sum", "norm_sq_sum", "weighted_norm_sum", "weighted_norm_sq_sum")


def _header(network: Network, num_experts: int, slices: tuple[str, ...], requests: int) -> Header:
    return Header(
        schema_version=SCHEMA_VERSION,
        model=Fingerprint(
            architecture="qwen3_moe",
            num_layers=network.num_layers,
            num_experts=num_experts,
            top_k=network.top_k,
            dtype="float32",
            quantization=None,
            config_sha256="0" * 64,
            weights_sha256="0" * 64,
        ),
        layers=tuple(Layer(index=i, name=f"model.layers.{i}.mlp.experts") for i in range(network.num_layers)),
        slices=slices,
        windows=(
            Window(
                id="0",
                started="2026-01-01T00:00:00+00:00",
                ended="2026-01-01T00:00:00+00:00",
                recorder="transformers",
                requests=requests,
                prompt_tokens_total=0,
                prompt_tokens_computed=0,
                sample_fraction=1.0,
                complete=True,
            ),
        ),
        engine={},
        provenance=provenance(),
    )
