"""Options of `reap-serve plan`, and the two that are small languages of their own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from reap_serve.errors import RequestError

# The names of `statistics.saliency.CRITERIA`, which is not imported for a help text.
CRITERIA_HELP = "reap, frequency, gate_sum, ean_sum, ean_mean, weighted_ean_sum, msan, asq or random."


class Objective(StrEnum):
    """Names of `--objective`."""

    MEAN = "mean"
    MAX_MIN = "max-min"


class Budget(StrEnum):
    """Names of `--budget`."""

    UNIFORM = "uniform"
    GLOBAL = "global"


class Unseen(StrEnum):
    """Names of `--unseen`."""

    KEEP = "keep"
    DROP = "drop"


# Panels of the help, in the order in which a plan is thought about.
SIZE, EVIDENCE, SERVING, OUTPUT = "Size: one of the first four", "Evidence: what decides", "Limits of serving", "Output"

Stats = Annotated[list[str], typer.Argument(metavar="STATS", help="Statistics files or URLs; they are added.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The plan to write.", rich_help_panel=OUTPUT)]
KeepFraction = Annotated[
    float | None,
    typer.Option(
        help="Fraction of each layer's experts to keep; halves round up, then to the limits.", rich_help_panel=SIZE
    ),
]
KeepExperts = Annotated[int | None, typer.Option(help="Experts to keep in each layer.", rich_help_panel=SIZE)]
TargetBytes = Annotated[int | None, typer.Option(help="Largest checkpoint, in bytes of tensors.", rich_help_panel=SIZE)]
Sweep = Annotated[
    str | None,
    typer.Option(
        metavar="F,F,...", help="Print the trade-off of these keep fractions; write no plan.", rich_help_panel=SIZE
    ),
]
Model = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model, for its group limits and tensor sizes.", rich_help_panel=SERVING),
]
Criterion = Annotated[str, typer.Option(help=CRITERIA_HELP, rich_help_panel=EVIDENCE)]
Seed = Annotated[int, typer.Option(help="Of the criterion random.", rich_help_panel=EVIDENCE)]
Mix = Annotated[
    str | None,
    typer.Option(
        metavar="SLICE=WEIGHT,...", help="Mixture of slices; all as observed by default.", rich_help_panel=EVIDENCE
    ),
]
ObjectiveOption = Annotated[
    Objective,
    typer.Option(
        help="Keep the best of the mixture, or maximise the worst slice's retained saliency.", rich_help_panel=EVIDENCE
    ),
]
BudgetOption = Annotated[
    Budget,
    typer.Option(
        help="One count for all layers, or counts by layer (needs the patch to be served).", rich_help_panel=SIZE
    ),
]
PadToMax = Annotated[
    bool, typer.Option("--pad-to-max", help="Raise global counts to their maximum.", rich_help_panel=SIZE)
]
MultipleOf = Annotated[int, typer.Option(help="Keep a multiple of this.", rich_help_panel=SERVING)]
TensorParallelSize = Annotated[int, typer.Option(help="vLLM's option of the same name.", rich_help_panel=SERVING)]
ExpertParallelSize = Annotated[int, typer.Option(help="Ranks that share the experts.", rich_help_panel=SERVING)]
MoeBackend = Annotated[str | None, typer.Option(help="vLLM's option of the same name.", rich_help_panel=SERVING)]
PreserveSuperExperts = Annotated[
    bool,
    typer.Option(
        "--preserve-super-experts", help="Never drop a super expert (arXiv 2507.23279).", rich_help_panel=EVIDENCE
    ),
]
DropUnsound = Annotated[
    str | None,
    typer.Option(
        "--drop-unsound",
        metavar="MODEL",
        help="Drop experts first whose weights in MODEL are unsound, as `verify` says.",
        rich_help_panel=EVIDENCE,
    ),
]
MinTokens = Annotated[int, typer.Option(help="Do not judge experts with fewer tokens.", rich_help_panel=EVIDENCE)]
UnseenOption = Annotated[
    Unseen, typer.Option(help="What becomes of experts that are not judged.", rich_help_panel=EVIDENCE)
]
MaxInstability = Annotated[
    float | None,
    typer.Option(
        help="Largest expected fraction of decisions that as much traffic again would change.", rich_help_panel=EVIDENCE
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Plan also where the statistics are too few.", rich_help_panel=EVIDENCE)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=OUTPUT)]


def parse_mix(text: str) -> dict[str, float]:
    """The weights in `slice=weight,...`.

    Raises:
        RequestError: A part has no number, or a slice stands twice.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = float("nan")
        if not name or number != number or name in weights:
            raise RequestError(f"--mix: {part!r} is not a new slice=weight", "write --mix code=0.7,chat=0.3")
        weights[name] = number
    return weights


def parse_fractions(text: str) -> list[float]:
    """The fractions in `F,F,...`.

    Raises:
        RequestError: A part is not a number above 0 and at most 1.
    """
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise RequestError(f"--sweep {text!r} is no list of fractions to keep", "write --sweep 0.25,0.375,0.5")
    return fractions
