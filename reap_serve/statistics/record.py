"""The statistics in memory: an immutable header and float64 sums.

Axes: S slices, P phases, L layers with routed experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from reap_serve.model import Fingerprint
from reap_serve.records import Provenance, Record

SCHEMA_VERSION = 1
PHASES = ("prefill", "decode")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Layer(Record):
    """A layer with routed experts.

    Attributes:
        index: Index of the decoder layer; what plans and checkpoints are joined by.
        name: vLLM's name of the module, such as `model.layers.0.mlp.experts`.
    """

    index: int
    name: str


class Window(Record):
    """One uninterrupted stretch of observation by one process.

    Attributes:
        id: Unique; merging refuses to count a window twice.
        started: UTC time, ISO 8601.
        ended: UTC time, ISO 8601.
        recorder: Which recorder made the sums.
        requests: Requests seen.
        prompt_tokens_total: Prompt tokens of these requests.
        prompt_tokens_computed: Of those, tokens that passed the experts: prefix-cache hits do not.
        sample_fraction: Fraction of the real tokens that were recorded.
        complete: False when a recorder stopped early or tokens were lost.
    """

    id: str
    started: str
    ended: str
    recorder: str
    requests: int
    prompt_tokens_total: int
    prompt_tokens_computed: int
    sample_fraction: float
    complete: bool


class Header(Record):
    """What the sums are of."""

    schema_version: int
    model: Fingerprint
    layers: tuple[Layer, ...]
    slices: tuple[str, ...]
    windows: tuple[Window, ...]
    engine: dict[str, str]
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class ExpertSums:
    """Sums over the recorded tokens routed to each expert, axes [S, P, L, E].

    With g the gate weight that the model applies to the expert's output f (after renormalisation, bias, groups and
    scaling) and the 2-norm over the hidden dimension.

    Attributes:
        token_count_SPLE: Routed tokens, int64.
        gate_sum_SPLE: Sum of g.
        norm_sum_SPLE: Sum of |f|.
        norm_sq_sum_SPLE: Sum of |f|^2.
        weighted_norm_sum_SPLE: Sum of g|f|; divided by the count it is REAP (arXiv 2510.13999, equation 5).
        weighted_norm_sq_sum_SPLE: Sum of (g|f|)^2.
        norm_max_SPLE: Largest |f|.
        activation_max_SPLE: Largest absolute component of f.
    """

    token_count_SPLE: Ints
    gate_sum_SPLE: Floats
    norm_sum_SPLE: Floats
    norm_sq_sum_SPLE: Floats
    weighted_norm_sum_SPLE: Floats
    weighted_norm_sq_sum_SPLE: Floats
    norm_max_SPLE: Floats
    activation_max_SPLE: Floats

    @classmethod
    def zeros(cls, num_slices: int, num_layers: int, num_experts: int) -> ExpertSums:
        """Sums of nothing."""
        shape = (num_slices, len(PHASES), num_layers, num_experts)
        return cls(np.zeros(shape, np.int64), *(np.zeros(shape) for _ in fields(cls)[1:]))


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was observed.

    Attributes:
        header: Of what, when, and how.
        sums: Per expert.
        layer_token_count_SPL: Recorded tokens that passed each layer, int64; top_k times it is the sum of the experts'
            counts.
    """

    header: Header
    sums: ExpertSums
    layer_token_count_SPL: Ints
