"""Tokens made up at random, and the statistics of any part of them, summed row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import statistics_factory as made_up

from reap_serve.model import Fingerprint
from reap_serve.statistics.record import PHASES, ExpertSums, Header, Statistics, Window
from reap_serve.statistics.saliency import MixedSums


def fingerprint(num_layers: int, num_experts: int, top_k: int, weights: str = "w") -> Fingerprint:
    return made_up.fingerprint(num_layers, num_experts, top_k, weights=weights)


def window(id_: str, minute: int = 0) -> Window:
    started, ended = (f"2026-01-01T00:{each:02d}:00+00:00" for each in (minute, minute + 1))
    return made_up.window(id_, started=started, ended=ended, requests=3, prompt_tokens=(30, 20))


def header(model: Fingerprint, slices: tuple[str, ...], id_: str, layers: tuple[int, ...] | None = None) -> Header:
    return made_up.header(model, slices, window(id_), layers)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Routed tokens; axes T tokens, L layers, K chosen experts."""

    slice_T: npt.NDArray[np.int64]
    phase_T: npt.NDArray[np.int64]
    expert_TLK: npt.NDArray[np.int64]
    gate_TLK: npt.NDArray[np.float64]
    norm_TLK: npt.NDArray[np.float64]

    def __getitem__(self, rows: slice | npt.NDArray[np.generic]) -> Tokens:
        return Tokens(
            self.slice_T[rows], self.phase_T[rows], self.expert_TLK[rows], self.gate_TLK[rows], self.norm_TLK[rows]
        )


def random_tokens(
    rng: np.random.Generator, num_tokens: int, num_layers: int, num_experts: int, top_k: int, num_slices: int = 1
) -> Tokens:
    shape = (num_tokens, num_layers, top_k)
    scores = rng.random((num_tokens, num_layers, num_experts))
    return Tokens(
        rng.integers(num_slices, size=num_tokens),
        rng.integers(len(PHASES), size=num_tokens),
        np.argsort(scores, axis=-1)[..., :top_k],
        rng.uniform(0.1, 1.0, shape),
        rng.lognormal(0.0, 0.5, shape),
    )


def statistics_of(
    tokens: Tokens, num_experts: int, slices: tuple[str, ...] = ("default",), id_: str = "w0", *, optional: bool = False
) -> Statistics:
    """The sums of tokens; the vector f of an expert is its norm along the first of three axes."""
    num_tokens, num_layers, top_k = tokens.expert_TLK.shape
    model = fingerprint(num_layers, num_experts, top_k)
    sums = ExpertSums.zeros(len(slices), num_layers, num_experts)
    output_sum_SPLEH = np.zeros((*sums.token_count_SPLE.shape, 3))
    coselection_SPLEE = np.zeros((*sums.token_count_SPLE.shape, num_experts), np.int64)
    layer_token_count_SPL = np.zeros((len(slices), len(PHASES), num_layers), np.int64)
    for t in range(num_tokens):
        s, p = int(tokens.slice_T[t]), int(tokens.phase_T[t])
        layer_token_count_SPL[s, p] += 1
        for row in range(num_layers):
            for expert, gate, norm in zip(
                tokens.expert_TLK[t, row], tokens.gate_TLK[t, row], tokens.norm_TLK[t, row], strict=True
            ):
                place = s, p, row, int(expert)
                sums.token_count_SPLE[place] += 1
                sums.gate_sum_SPLE[place] += gate
                sums.norm_sum_SPLE[place] += norm
                sums.norm_sq_sum_SPLE[place] += norm**2
                sums.weighted_norm_sum_SPLE[place] += gate * norm
                sums.weighted_norm_sq_sum_SPLE[place] += (gate * norm) ** 2
                sums.norm_max_SPLE[place] = max(sums.norm_max_SPLE[place], norm)
                sums.activation_max_SPLE[place] = max(sums.activation_max_SPLE[place], norm / 2)
                output_sum_SPLEH[(*place, 0)] += norm
                coselection_SPLEE[(*place, tokens.expert_TLK[t, row])] += 1
    if optional:
        sums = ExpertSums(
            *(getattr(sums, name) for name in ExpertSums.__slots__[:8]),
            output_sum_SPLEH,
            coselection_SPLEE,
            coselection_SPLEE * 0.5,
        )
    return Statistics(header(model, slices, id_), sums, layer_token_count_SPL)


def reap_standard_error(sums: MixedSums) -> npt.NDArray[np.float64]:
    """Standard error of `reap`, axes [L, E], for slices pooled as observed and tokens taken as independent.

    The standard deviation of g|f| over the routed tokens, with n - 1 in the denominator, over the root of n; NaN
    below two tokens, where no spread can be seen. Tokens of one request are not independent: `uncertainty` has the
    standard error that counts with this.
    """
    n_LE = sums.token_count_LE
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_LE = sums.weighted_norm_sum_LE / n_LE
        variance_LE = np.maximum(sums.weighted_norm_sq_sum_LE / n_LE - mean_LE**2, 0)
        return np.where(n_LE >= 2, np.sqrt(variance_LE / (n_LE - 1)), np.nan)
