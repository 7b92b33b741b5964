"""The statistics in memory: an immutable header and float64 sums.

Axes: S slices, P phases, L layers with routed experts, E experts, H hidden dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from reap_serve.model import Fingerprint
from reap_serve.records import FileRecord, Provenance, Record
from reap_serve.slice_name import SliceName
from reap_serve.statistics.sums import Merge, Of, Sum, declared, sums_of
from reap_serve.traffic.receipt import SliceReceipt

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

    index: int = Field(ge=0)
    name: str


class Window(Record):
    """One uninterrupted stretch of observation by one process.

    Attributes:
        id: Unique; merging refuses to count a window twice.
        started: UTC time, ISO 8601.
        ended: UTC time, ISO 8601.
        recorder: Which recorder made the sums.
        requests: Requests with a token computed in the window.
        prompt_tokens_total: Prompt tokens of these requests.
        prompt_tokens_computed: Of those, tokens that passed the experts: prefix-cache hits do not.
        sample_fraction: Fraction of the real tokens that were recorded.
        complete: False when a recorder stopped early or tokens were lost.
    """

    id: str = Field(min_length=1)
    started: str
    ended: str
    recorder: str
    requests: int = Field(ge=0)
    prompt_tokens_total: int = Field(ge=0)
    prompt_tokens_computed: int = Field(ge=0)
    sample_fraction: float = Field(gt=0, le=1)
    complete: bool


class Ageing(Record):
    """How sums were weighed by age: what ended a half-life before `as_of` counts half.

    Attributes:
        half_life_seconds: H in the weight 2^(-age / H).
        as_of: UTC time, ISO 8601, at which the weight is 1.
    """

    half_life_seconds: float = Field(gt=0, allow_inf_nan=False)
    as_of: str


class Header(FileRecord):
    """What the sums are of.

    Attributes:
        schema_version: Of the file format.
        model: Fingerprint of the model.
        layers: Layers that the sums cover, ascending by index; a pipeline rank covers its own.
        slices: Names of the slices, in the order of axis S.
        windows: What was observed when; never empty, since merging refuses a window that it has seen.
        engine: What ran the model, such as `vllm` to its version and `recorder` to its kind.
        provenance: What made the file.
        ageing: How the sums were weighed by age; their counts are no integers then. None where every token counts 1.
        traffic: Receipts of the recorded traffic by slice; empty for served traffic, and in files of older releases.
    """

    model: Fingerprint
    layers: tuple[Layer, ...] = Field(min_length=1)
    slices: tuple[SliceName, ...] = Field(min_length=1)
    windows: tuple[Window, ...] = Field(min_length=1)
    engine: dict[str, str]
    traffic: dict[str, SliceReceipt] = Field(default_factory=dict)
    provenance: Provenance
    ageing: Ageing | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> Header:
        indices = [layer.index for layer in self.layers]
        if indices != sorted(set(indices)):
            raise ValueError("layers are not ascending by index")
        for what, names in (("slice", self.slices), ("window", tuple(window.id for window in self.windows))):
            if len(set(names)) != len(names):
                raise ValueError(f"a {what} is named twice")
        return self

    @property
    def complete(self) -> bool:
        """Whether every window is complete and every layer of the model is covered."""
        return len(self.layers) == self.model.num_layers and all(window.complete for window in self.windows)


@dataclass(frozen=True, slots=True)
class ExpertSums:
    """Sums over the recorded tokens routed to each expert, axes [S, P, L, E]; here each is declared, see `sums`.

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
        output_sum_SPLEH: Sum of f, the vector; None unless asked for, since it is H times larger.
        coselection_count_SPLEE: Tokens routed to both experts, int64, symmetric, its diagonal the token count; None
            unless asked for, since it is E times larger.
        logit_gram_SPLEE: Sum of z z' over the tokens of the layer, z the router's logits; None unless asked for.
    """

    token_count_SPLE: Ints = field(metadata=declared(Of.ROUTES, is_count=True, reference="expert_frequency"))
    gate_sum_SPLE: Floats = field(metadata=declared(Of.ROUTES, reference="weighted_expert_frequency_sum"))
    norm_sum_SPLE: Floats = field(metadata=declared(Of.ROUTES, reference="ean_sum"))
    norm_sq_sum_SPLE: Floats = field(metadata=declared(Of.ROUTES))
    weighted_norm_sum_SPLE: Floats = field(metadata=declared(Of.ROUTES, reference="weighted_ean_sum"))
    weighted_norm_sq_sum_SPLE: Floats = field(metadata=declared(Of.ROUTES))
    norm_max_SPLE: Floats = field(metadata=declared(Of.ROUTES, merge=Merge.MAX))
    activation_max_SPLE: Floats = field(
        metadata=declared(Of.ROUTES, merge=Merge.MAX, reference="max_activations"),
    )
    output_sum_SPLEH: Floats | None = field(default=None, metadata=declared(Of.OUTPUTS))
    coselection_count_SPLEE: Ints | None = field(default=None, metadata=declared(Of.OUTPUTS, is_count=True))
    logit_gram_SPLEE: Floats | None = field(default=None, metadata=declared(Of.LOGITS))

    @classmethod
    def zeros(cls, num_slices: int, num_layers: int, num_experts: int) -> ExpertSums:
        """Sums of nothing, without the optional ones."""
        shape = (num_slices, len(PHASES), num_layers, num_experts)
        required = {name: zeros(name, shape) for name in EXPERT_FIELDS if name not in OPTIONAL_FIELDS}
        return cls(**required)  # type: ignore[arg-type]


EXPERT_SUMS = sums_of(ExpertSums)
EXPERT_FIELDS = tuple(each.field for each in EXPERT_SUMS)
OPTIONAL_FIELDS = tuple(each.field for each in EXPERT_SUMS if each.is_optional)
MAX_FIELDS = tuple(each.field for each in EXPERT_SUMS if each.merge is Merge.MAX)


@dataclass(frozen=True, slots=True)
class BatchSums:
    """Second moments of batches: how much the sums vary between stretches of traffic; axes [S, L, E], phases added up.

    Tokens of one request resemble each other, so the spread of single tokens understates how much the sums would
    differ on other requests. A batch is a stretch of traffic that holds requests nearly whole, with C tokens routed to
    the expert and Y the sum of their g|f|.

    Attributes:
        batch_count_SLE: Batches with C > 0.
        batch_weighted_sq_SLE: Sum of Y^2.
        batch_cross_SLE: Sum of Y C.
        batch_token_sq_SLE: Sum of C^2.
    """

    batch_count_SLE: Ints = field(metadata=declared(Of.BATCHES, is_count=True))
    batch_weighted_sq_SLE: Floats = field(metadata=declared(Of.BATCHES))
    batch_cross_SLE: Floats = field(metadata=declared(Of.BATCHES))
    batch_token_sq_SLE: Floats = field(metadata=declared(Of.BATCHES))

    @classmethod
    def of_one(cls, token_count_SLE: Ints | Floats, weighted_norm_sum_SLE: Ints | Floats) -> BatchSums:
        """The moments of one batch; the axis S may be missing."""
        token_count_SLE = token_count_SLE.astype(np.float64, copy=False)
        return cls(
            (token_count_SLE > 0).astype(np.int64),
            np.square(weighted_norm_sum_SLE),
            weighted_norm_sum_SLE * token_count_SLE,
            np.square(token_count_SLE),
        )


BATCH_FIELDS = tuple(each.field for each in sums_of(BatchSums))


def is_count(name: str) -> bool:
    """Whether a field holds integers."""
    return SUMS[name].is_count


def zeros(name: str, shape: tuple[int, ...], *, aged: bool = False) -> Ints | Floats:
    """A field of nothing; aged counts are no integers."""
    return np.zeros(shape, np.int64) if is_count(name) and not aged else np.zeros(shape, np.float64)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was observed.

    Attributes:
        header: Of what, when, and how.
        sums: Per expert.
        layer_token_count_SPL: Recorded tokens that passed each layer, int64; top_k times it is the sum of the experts'
            counts.
        batches: Moments of the batches; None when all of it is one batch, so that its sums say the same.
    """

    header: Header
    sums: ExpertSums
    layer_token_count_SPL: Ints = field(metadata=declared(Of.TOKENS, is_count=True, reference="total_tokens"))
    batches: BatchSums | None = None

    @classmethod
    def from_fields(cls, header: Header, fields_by_name: Mapping[str, Ints | Floats]) -> Statistics:
        """Statistics of arrays by field name; with those of `BatchSums` or without."""
        experts = {name: fields_by_name[name] for name in EXPERT_FIELDS if name in fields_by_name}
        batches = {name: fields_by_name[name] for name in BATCH_FIELDS if name in fields_by_name}
        return cls(
            header,
            ExpertSums(**experts),  # type: ignore[arg-type]
            fields_by_name[LAYER_FIELD],  # type: ignore[arg-type]
            BatchSums(**batches) if batches else None,  # type: ignore[arg-type]
        )

    def fields_by_name(self) -> dict[str, Ints | Floats]:
        """Every array with axes S and P that is present, by field name; those of `ExpertSums` first."""
        present: dict[str, Ints | Floats] = {
            name: values for name in EXPERT_FIELDS if (values := getattr(self.sums, name)) is not None
        }
        present[LAYER_FIELD] = self.layer_token_count_SPL
        return present

    def batch_sums(self) -> BatchSums:
        """`batches`, or those of the one batch that all of it is."""
        return self.batches or BatchSums.of_one(
            self.sums.token_count_SPLE.sum(axis=1), self.sums.weighted_norm_sum_SPLE.sum(axis=1)
        )

    def tokens_per_slice(self) -> tuple[int, ...]:
        """Tokens of each slice: those that passed its most visited layer, over both phases."""
        return tuple(int(count_L.max()) for count_L in self.layer_token_count_SPL.sum(axis=1))


# Every sum of a file, by its field.
SUMS: Mapping[str, Sum] = {each.field: each for kind in (ExpertSums, BatchSums, Statistics) for each in sums_of(kind)}
LAYER_FIELD = next(each.field for each in SUMS.values() if each.of is Of.TOKENS)
