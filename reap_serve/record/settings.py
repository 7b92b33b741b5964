"""What switches observation on: `--additional-config '{"reap_serve": {...}}'`.

vLLM carries the additional configuration to every process and into the hash of its compile cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from reap_serve.errors import RequestError
from reap_serve.records import JsonValue, Record
from reap_serve.slice_name import SliceName
from reap_serve.statistics.record import EXPERT_SUMS
from reap_serve.statistics.sums import Of

CONFIG_KEY = "reap_serve"
# The name by which a request asks for the full model where another plan is the default.
BASE_PLAN = "base"
# Plans that an engine has room for at a time.
MAX_PLANS = 32

RecorderName = Literal["auto", "inline", "deferred", "moe_sum"]
OPTIONAL_SUMS = tuple(each.name for each in EXPERT_SUMS if each.is_asked_for)
SUMS_OF_LOGITS = frozenset(each.name for each in EXPERT_SUMS if each.of is Of.LOGITS)


def extra_sums_named(names: Sequence[str]) -> tuple[str, ...]:
    """The optional sums of these names.

    Raises:
        RequestError: There is no such sum.
    """
    for name in names:
        if name not in OPTIONAL_SUMS:
            raise RequestError(f"there is no optional sum {name}", f"use one of: {', '.join(OPTIONAL_SUMS)}")
    return tuple(name for name in OPTIONAL_SUMS if name in names)


def _known_sum(name: str) -> str:
    if name not in OPTIONAL_SUMS:
        raise ValueError(f"is none of: {', '.join(OPTIONAL_SUMS)}")
    return name


class ObserveSettings(Record):
    """Observation of one engine.

    Attributes:
        recorder: `auto` chooses for each layer (`choice`). `inline` replaces the layer's computation by one whose rows
            it can measure; `deferred` leaves it alone and measures a copy of the routed inputs later; `moe_sum` reads
            the rows where a GPU kernel has them.
        outputs_served: Somebody gets the outputs, which have to stay as they are: `auto` then never takes `inline`.
        keep_kernel: Leave the choice of the experts' kernel to vLLM, and refuse where it cannot be observed.
        read_kernel_rows: Where vLLM's CPU kernel leaves its rows in memory, all but `moe_sum` read them there
            (see `kernel_rows`) and leave the computation alone; False never does.
        recording: Record from the first request on; False waits for `start`.
        sample_fraction: Probability with which a token is recorded.
        overhead_budget: Fraction of the engine's time that recording may take; it lowers the sampled fraction to hold
            it. None keeps `sample_fraction`.
        extra_sums: Optional sums to collect, which merging needs (see `extra_sums.ExtraSums`); none costs nothing.
        buffer_tokens: Tokens held per layer before they are measured: by `deferred`, and of small steps where rows are
            read.
        max_slices: Slices told apart, `default` and `other` included; tokens of further ones go to the slice `other`.
        slices: Names that requests may bring besides `default`; others go to the slice `other`. Empty allows all.
        directory: Where a serving engine writes its statistics; None keeps them in memory.
        flush_seconds: Seconds between two files.
        minimum_tokens: A slice with fewer tokens is not written: small counts tell of single requests.
        plans: Plan files by name, loaded before the server answers; requests choose one by `vllm_xargs.reap_plan`.
        mask: Name of the plan for requests that choose none; None is the full model.
        mask_phase: Of `plans`: `decode` lets the full model read prompts, and the plans write answers.
        mask_places: Plans that CUDA graphs have room for at a time; None takes one more than `plans` has, and 0 where
            it has none, since places cost time in every step (`serve.graph_mask`). Eager engines need none.
        drift_fraction: Share of the steps that measure the gate mass of dropped experts.
        metrics_seconds: Seconds between two readings of the engine for the metrics.
    """

    recorder: RecorderName = "auto"
    outputs_served: bool = True
    keep_kernel: bool = False
    read_kernel_rows: bool = True
    recording: bool = True
    sample_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    overhead_budget: float | None = Field(default=None, gt=0.0, lt=1.0)
    extra_sums: tuple[Annotated[str, AfterValidator(_known_sum)], ...] = ()
    buffer_tokens: int = Field(default=1024, ge=1, le=65536)
    max_slices: int = Field(default=16, ge=1, le=1024)
    slices: tuple[SliceName, ...] = ()
    directory: str | None = None
    flush_seconds: float = Field(default=60.0, gt=0.0)
    minimum_tokens: int = Field(default=1000, ge=0)
    plans: dict[str, str] = {}
    mask: str | None = None
    mask_phase: Literal["all", "decode"] = "all"
    mask_places: int | None = Field(default=None, ge=0, le=MAX_PLANS)
    drift_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    metrics_seconds: float = Field(default=10.0, gt=0.0)

    @property
    def sums_of_logits(self) -> tuple[str, ...]:
        """Those of the optional sums that are made of the routers' logits."""
        return tuple(name for name in self.extra_sums if name in SUMS_OF_LOGITS)

    @property
    def places_in_graphs(self) -> int:
        """Plans that CUDA graphs have room for."""
        if self.mask_places is not None:
            return self.mask_places
        return min(len(self.plans) + 1, MAX_PLANS) if self.plans else 0

    @model_validator(mode="after")
    def _plans_have_places(self) -> ObserveSettings:
        if self.mask_places is not None and self.mask_places < len(self.plans):
            raise ValueError(f"mask_places is {self.mask_places}, and {len(self.plans)} plans are given")
        return self

    @model_validator(mode="after")
    def _slices_have_slots(self) -> ObserveSettings:
        needed = len({*self.slices, "default", "other"})
        if self.slices and needed > self.max_slices:
            raise ValueError(f"max_slices is {self.max_slices}, and the named slices need {needed}")
        return self


def checked_settings(values: Mapping[str, JsonValue]) -> ObserveSettings:
    """The settings of these values, checked before an engine is started with them.

    Raises:
        RequestError: There is no such setting, or a value is out of its range.
    """
    try:
        return ObserveSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if not name:
            raise RequestError(first["msg"].removeprefix("Value error, "), "see --help") from None
        given = str(first["input"])[:120]
        raise RequestError(f"{name} cannot be {given}: {first['msg']}", "see --help for its range") from None
