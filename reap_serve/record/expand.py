"""Unfuses one layer: the fused kernel called with one row a route.

Every token is repeated K times and `topk_ids` becomes one column, so that row (t, k) of the output is the output of
expert ids[t, k] for token t, weighted or not.

Axes: T tokens, K experts per token, N = T*K rows, H hidden.
"""

from __future__ import annotations

import torch

from reap_serve.record.accumulate import RowMeasures
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.row_sizes import row_sizes


def expert_rows(
    layer: LayerFacts, x_TH: torch.Tensor, weight_TK: torch.Tensor, expert_ids_TK: torch.Tensor
) -> torch.Tensor:
    """Rows weight[t, k] * f_ids[t, k](x[t]), shape [T, K, H], in the dtype of the layer."""
    num_tokens, top_k = expert_ids_TK.shape
    x_NH = x_TH if top_k == 1 else x_TH.repeat_interleave(top_k, dim=0)
    weight_N1 = weight_TK.reshape(-1, 1)
    if layer.weight_on_input:
        # Having applied them, vLLM's CPU kernel overwrites the weights with ones.
        weight_N1 = weight_N1.clone()
    ids_N1 = _asked(layer, expert_ids_TK).reshape(-1, 1)
    if layer.call_rows is None or x_NH.shape[0] <= layer.call_rows:
        rows_NH = layer.forward_experts(x_NH, weight_N1, ids_N1)
    else:
        parts = zip(*(torch.split(values, layer.call_rows) for values in (x_NH, weight_N1, ids_N1)), strict=True)
        rows_NH = torch.cat([layer.forward_experts(*part) for part in parts])
    return rows_NH.view(num_tokens, top_k, -1)


def local_ids(layer: LayerFacts, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """The ids with those of other ranks' experts replaced by -1: their rows were never written."""
    if layer.expert_map_E is None:
        return expert_ids_TK
    here_TK = layer.expert_map_E[_asked(layer, expert_ids_TK).clamp(min=0).long()] >= 0
    return torch.where(here_TK, expert_ids_TK, -1)


def _asked(layer: LayerFacts, expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """Ids as the kernel takes them: those of replicas, where experts have some."""
    return expert_ids_TK if layer.replica_of is None else layer.replica_of(expert_ids_TK)


def counted(layer: LayerFacts, expert_ids_TK: torch.Tensor, measured: RowMeasures) -> tuple[torch.Tensor, RowMeasures]:
    """What this rank adds to its sums: ids, -1 for what it does not count, and their measures.

    Of experts that ranks share, each route is measured by one rank. Added up, the measures are the same on all of them,
    to the bit: the others bring zeros.
    """
    if layer.expert_map_E is None:
        return expert_ids_TK, measured
    local_TK = local_ids(layer, expert_ids_TK)
    if layer.complete_sizes is None:
        return local_TK, measured
    sizes = torch.stack((measured.norm_TK, measured.weighted_norm_TK, measured.activation_TK))
    sizes = layer.complete_sizes(torch.where(local_TK >= 0, sizes, 0))
    return expert_ids_TK, RowMeasures(measured.gate_TK, sizes[0], sizes[1], sizes[2])


def measure_rows(layer: LayerFacts, rows_TKH: torch.Tensor, gate_TK: torch.Tensor, weighted: bool) -> RowMeasures:
    """Norms and largest components of expert outputs.

    Args:
        layer: The layer.
        rows_TKH: Expert outputs; overwritten under tensor parallelism.
        gate_TK: The router's weights, float32.
        weighted: The rows carry the router's weights.

    Returns:
        The measures; the gate includes the layer's own scaling. Where the weight is applied to the input, f(g*x) is all
        there is: it counts as both the plain and the weighted output (times the scaling).
    """
    if layer.complete_rows is not None:
        rows_TKH = layer.complete_rows(rows_TKH)
    size_N, largest_N = row_sizes(rows_TKH.reshape(-1, rows_TKH.shape[-1]))
    size_TK, largest_TK = size_N.view(rows_TKH.shape[:2]), largest_N.view(rows_TKH.shape[:2])
    gate_TK = gate_TK.float()
    applied_TK = gate_TK * layer.gate_scale
    if layer.weight_on_input:
        return RowMeasures(applied_TK, size_TK, size_TK * layer.gate_scale, largest_TK)
    if not weighted:
        return RowMeasures(applied_TK, size_TK, size_TK * applied_TK.abs(), largest_TK)
    # A weight that underflowed to 0 leaves no trace of the output: count its norm as 0, never as 0/0.
    inverse_TK = torch.where(gate_TK == 0, 0.0, 1.0 / gate_TK.abs())
    return RowMeasures(applied_TK, size_TK * inverse_TK, size_TK * layer.gate_scale, largest_TK * inverse_TK)


def add_rows(rows_TKH: torch.Tensor) -> torch.Tensor:
    """The sum over a token's K rows [T, H], rounded once."""
    if rows_TKH.shape[1] == 2:
        # One addition is rounded once as it is, and runs over contiguous rows.
        return rows_TKH[:, 0] + rows_TKH[:, 1]
    return rows_TKH.sum(dim=1)
