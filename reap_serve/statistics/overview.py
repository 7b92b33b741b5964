"""What `stats show` says: the statistics as one document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap_serve.records import JsonValue
from reap_serve.statistics.record import SCHEMA_VERSION, SUMS, Floats, Statistics
from reap_serve.statistics.saliency import MixedSums, mix_slices, saliency, slice_terms
from reap_serve.statistics.uncertainty import (
    MIN_BATCHES,
    expected_instability,
    standard_error,
    tokens_for_instability,
)


@dataclass(frozen=True, slots=True)
class Overview:
    """Statistics, a criterion and a number to keep, worked out.

    Attributes:
        statistics: The statistics.
        criterion: Name of the criterion.
        keep: Experts kept per layer.
        max_instability: Above it a choice does not count as sure.
        sums: Pooled over slices and phases.
        saliency_LE: By the criterion.
        error_LE: Its standard error.
        instability_L: Expected fraction of keep/drop decisions that differ on as much traffic again.
        tokens_needed: Tokens that bring the instability to `max_instability`, None when unknown.
    """

    statistics: Statistics
    criterion: str
    keep: int
    max_instability: float
    sums: MixedSums
    saliency_LE: Floats
    error_LE: Floats
    instability_L: Floats
    tokens_needed: int | None

    @property
    def has_errors(self) -> bool:
        """Whether the criterion has a standard error on these statistics."""
        return not bool(np.isnan(self.error_LE).all())

    @property
    def error_source(self) -> str | None:
        """`batches` where most errors come from the spread of batches, else `tokens`; None without errors."""
        if not self.has_errors:
            return None
        batches = np.median(self.statistics.batch_sums().batch_count_SLE.sum(axis=0))
        return "batches" if self.criterion == "reap" and batches >= MIN_BATCHES else "tokens"


def overview(statistics: Statistics, criterion: str, keep: int | None, max_instability: float) -> Overview:
    """Works out a criterion and a number to keep.

    Args:
        statistics: The statistics, of the slices to pool.
        criterion: Name in `saliency.CRITERIA`.
        keep: Experts kept per layer, None for half.
        max_instability: Above it a choice does not count as sure.

    Raises:
        RequestError: There is no such criterion, or `keep` is out of range.
    """
    sums = mix_slices(statistics)
    saliency_LE = saliency(sums, criterion)
    error_LE = standard_error(slice_terms(statistics), criterion)
    keep = max(1, statistics.header.model.num_experts // 2) if keep is None else keep
    instability_L = expected_instability(saliency_LE, error_LE, keep)
    tokens_needed = None
    if not np.isnan(error_LE).all():
        num_tokens = int(sums.layer_token_count_L.max())
        tokens_needed = tokens_for_instability(saliency_LE, error_LE, keep, num_tokens, max_instability)
    return Overview(
        statistics, criterion, keep, max_instability, sums, saliency_LE, error_LE, instability_L, tokens_needed
    )


def document_of(overview: Overview) -> dict[str, JsonValue]:
    """The document that `stats show --json` prints."""
    header = overview.statistics.header
    tokens = overview.statistics.tokens_per_slice()
    return {
        "schema_version": SCHEMA_VERSION,
        "model": header.model.model_dump(mode="json"),
        "criterion": overview.criterion,
        "slices": list(header.slices),
        "complete": header.complete,
        "top_k": header.model.top_k,
        "num_experts": header.model.num_experts,
        "slice_token_count": dict(zip(header.slices, tokens, strict=True)),
        "windows": [window.model_dump(mode="json") for window in header.windows],
        "engine": header.engine,
        "stability": {
            "keep_experts": overview.keep,
            "flip_fraction": float(overview.instability_L.mean()) if overview.has_errors else None,
            "flip_fraction_threshold": overview.max_instability,
            "tokens_seen": int(overview.sums.layer_token_count_L.max()),
            "tokens_needed": overview.tokens_needed,
            "errors_from": overview.error_source,
        },
        "layers": [_layer_document(overview, row) for row in range(len(header.layers))],
    }


def _layer_document(overview: Overview, row: int) -> dict[str, JsonValue]:
    sums, layer = overview.sums, overview.statistics.header.layers[row]
    tokens = int(sums.layer_token_count_L[row])
    return {
        "layer": layer.name,
        "index": layer.index,
        "token_count": tokens,
        "layer_token_count": tokens,
        "flip_fraction": float(overview.instability_L[row]) if overview.has_errors else None,
        "experts": {
            **{name: _numbers(name, values_LE[row]) for name, values_LE in sums.by_name.items()},
            "saliency": overview.saliency_LE[row].tolist(),
            "saliency_stderr": _nullable(overview.error_LE[row]),
        },
    }


def _numbers(name: str, values_E: npt.NDArray[np.float64]) -> list[int] | list[float]:
    return [int(count) for count in values_E] if SUMS[f"{name}_SPLE"].is_count else values_E.tolist()


def _nullable(values_E: npt.NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values_E]
