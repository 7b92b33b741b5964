"""What merging must know of each layer's experts, from statistics with the optional sums.

Axes: S slices, P phases, L layers with routed experts, E experts, H hidden dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reap_serve.errors import RequestError
from reap_serve.statistics.record import Floats, Statistics
from reap_serve.statistics.saliency import mix_slices, saliency, slice_terms


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """One layer's experts.

    Attributes:
        token_count_E: Routed tokens.
        reap_E: Their saliency by `reap`.
        mean_output_EH: Mean of f over the tokens routed to each expert, 0 for an expert without any; None when the
            statistics lack `output_sum`.
        logit_cosine_EE: Cosine of two experts' router logits over all tokens of the layer; None when the statistics
            lack `logit_gram`.
    """

    token_count_E: Floats
    reap_E: Floats
    mean_output_EH: Floats | None
    logit_cosine_EE: Floats | None


def layer_signatures(statistics: Statistics, weights: Mapping[str, float] | None = None) -> tuple[LayerSignature, ...]:
    """The signatures of all layers, in their order.

    Args:
        statistics: The sums.
        weights: Share of each slice in the mixture; None pools all slices as observed (see `slice_terms`).

    Raises:
        RequestError: See `slice_terms`.
    """
    sums = mix_slices(statistics, weights)
    reap_LE = saliency(sums, "reap")
    count_LE = sums.token_count_LE
    output_LEH = _mixed(statistics, statistics.sums.output_sum_SPLEH, weights)
    gram_LEE = _mixed(statistics, statistics.sums.logit_gram_SPLEE, weights)
    return tuple(
        LayerSignature(
            count_LE[row],
            reap_LE[row],
            None if output_LEH is None else output_LEH[row] / np.maximum(count_LE[row], 1e-300)[:, None],
            None if gram_LEE is None else _cosine(gram_LEE[row]),
        )
        for row in range(count_LE.shape[0])
    )


def require_sums(signatures: tuple[LayerSignature, ...], method: str, outputs: bool, logits: bool) -> None:
    """Refuses statistics without the optional sums that a method takes.

    Raises:
        RequestError: Names the sum and how to collect it.
    """
    for needed, name, found in (
        (outputs, "output_sum", signatures[0].mean_output_EH),
        (logits, "logit_gram", signatures[0].logit_cosine_EE),
    ):
        if needed and found is None:
            raise RequestError(f"{method} takes {name}, which the statistics lack", f"observe with --extra-sum {name}")


def _mixed(statistics: Statistics, values_SPL: Floats | None, weights: Mapping[str, float] | None) -> Floats | None:
    if values_SPL is None:
        return None
    names = statistics.header.slices
    parts = [
        values_SPL[names.index(term.name)].sum(axis=0) * term.scale_L[:, None, None]
        for term in slice_terms(statistics, weights)
    ]
    mixed: Floats = np.sum(parts, axis=0)
    return mixed


def _cosine(gram_EE: Floats) -> Floats:
    length_E = np.sqrt(np.diagonal(gram_EE))
    product_EE = np.outer(length_E, length_E)
    return np.divide(gram_EE, product_EE, out=np.zeros_like(gram_EE), where=product_EE > 0)
