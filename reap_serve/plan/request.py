"""What the user asks the planner for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from reap_serve.errors import PlanError
from reap_serve.plan.limits import ServingTarget

Objective = Literal["mean", "max-min"]
Budget = Literal["uniform", "global"]
Unseen = Literal["keep", "drop"]


@dataclass(frozen=True, slots=True)
class Size:
    """How much stays. Exactly one of the three is given.

    Attributes:
        keep_fraction: Of the experts of a layer (of all layers together under a global budget), in (0, 1].
        keep_experts: Experts per layer (on average under a global budget).
        target_bytes: Upper bound on the bytes of the pruned checkpoint's tensors.
    """

    keep_fraction: float | None = None
    keep_experts: int | None = None
    target_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("keep_fraction", "keep_experts", "target_bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
            raise PlanError(
                f"a plan needs one of --keep-fraction, --keep-experts and --target-bytes, and {options} was given",
                "give exactly one",
            )
        fraction = self.keep_fraction
        if fraction is not None and not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise PlanError(f"--keep-fraction is {fraction}", "give the fraction to keep, above 0 and at most 1")
        for option, value in (("--keep-experts", self.keep_experts), ("--target-bytes", self.target_bytes)):
            if value is not None and value < 1:
                raise PlanError(f"{option} is {value}", "give 1 or more")

    def __str__(self) -> str:
        if self.keep_fraction is not None:
            return f"--keep-fraction {self.keep_fraction:g}"
        if self.keep_experts is not None:
            return f"--keep-experts {self.keep_experts}"
        return f"--target-bytes {self.target_bytes}"


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A whole request.

    Attributes:
        size: How much stays.
        criterion: Name in `statistics.saliency.CRITERIA`.
        seed: Of the criterion `random`.
        mix: Weights of slices; empty weighs each slice by its observed tokens.
        objective: `mean` keeps the highest criterion of the mixture; `max-min` maximises the worst slice's retained
            saliency.
        budget: `uniform` keeps equally many experts in each layer, as stock vLLM needs; `global` lets counts differ.
        pad_to_max: Raises the counts of a global budget to their maximum.
        target: How the pruned model will be served.
        preserve_super_experts: Never drop a super expert.
        min_tokens: Experts with fewer tokens are not judged by the criterion.
        unseen: What becomes of them.
        max_instability: Largest expected fraction of decisions that as much traffic again would change; None refuses
            only what noise alone would give.
        force: Plan beyond `max_instability`.
    """

    size: Size
    criterion: str = "reap"
    seed: int = 0
    mix: Mapping[str, float] = field(default_factory=dict)
    objective: Objective = "mean"
    budget: Budget = "uniform"
    pad_to_max: bool = False
    target: ServingTarget = field(default_factory=ServingTarget)
    preserve_super_experts: bool = False
    min_tokens: int = 0
    unseen: Unseen = "drop"
    max_instability: float | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise PlanError(f"--min-tokens is {self.min_tokens}", "give 0 or more")
        if self.max_instability is not None and not 0 <= self.max_instability <= 1:
            raise PlanError(f"--max-instability is {self.max_instability}", "give a fraction from 0 to 1")
        if self.pad_to_max and self.budget != "global":
            raise PlanError("--pad-to-max without --budget global changes nothing", "leave one of them out")
