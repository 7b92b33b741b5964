"""`reap-serve plan`: which experts stay. `plan show` and `plan diff` read plans."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from reap_serve.cli.app import app
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from reap_serve.plan.record import Plan

MAKE = "make"


class PlanGroup(TyperGroup):
    """`plan STATS...` makes a plan unless the first word names another command (write ./show for such a file)."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Puts the name of the default command before arguments that name none."""
        if not args or args[0] == MAKE or args[0] not in self.commands:
            args = [MAKE, *args]
        return super().parse_args(ctx, args)

    def resolve_command(  # type: ignore[no-untyped-def]
        self, ctx, args
    ):
        """Leaves the name of the default command out of usage lines and errors."""
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == MAKE else name), command, rest


plan_app = typer.Typer(cls=PlanGroup, help="Choose the experts that stay, from statistics.")
app.add_typer(plan_app, name="plan")


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


@plan_app.command(MAKE)
def make(
    stats: Annotated[list[str], typer.Argument(metavar="STATS", help="Statistics files or URLs; they are added.")],
    output: Annotated[Path, typer.Option(help="The plan to write.")],
    keep_fraction: Annotated[
        float | None, typer.Option(help="Fraction of each layer's experts to keep; halves round up.")
    ] = None,
    keep_experts: Annotated[int | None, typer.Option(help="Experts to keep in each layer.")] = None,
    target_bytes: Annotated[int | None, typer.Option(help="Largest checkpoint, in bytes of tensors.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model, for its group limits and tensor sizes.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="See `stats show --help`.")] = "reap",
    seed: Annotated[int, typer.Option(help="Of the criterion random.")] = 0,
    mix: Annotated[
        str | None, typer.Option(metavar="SLICE=WEIGHT,...", help="Mixture of slices; all as observed by default.")
    ] = None,
    objective: Annotated[
        Objective, typer.Option(help="Keep the best of the mixture, or maximise the worst slice's retained saliency.")
    ] = Objective.MEAN,
    budget: Annotated[
        Budget, typer.Option(help="One count for all layers, or counts by layer (needs the patch to be served).")
    ] = Budget.UNIFORM,
    pad_to_max: Annotated[bool, typer.Option("--pad-to-max", help="Raise global counts to their maximum.")] = False,
    multiple_of: Annotated[int, typer.Option(help="Keep a multiple of this.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(help="vLLM's option of the same name.")] = 1,
    expert_parallel_size: Annotated[int, typer.Option(help="Ranks that share the experts.")] = 1,
    moe_backend: Annotated[str | None, typer.Option(help="vLLM's option of the same name.")] = None,
    preserve_super_experts: Annotated[
        bool, typer.Option("--preserve-super-experts", help="Never drop a super expert (arXiv 2507.23279).")
    ] = False,
    min_tokens: Annotated[int, typer.Option(help="Do not judge experts with fewer tokens.")] = 0,
    unseen: Annotated[Unseen, typer.Option(help="What becomes of experts that are not judged.")] = Unseen.DROP,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Choose the experts that stay, from statistics. Further: `plan show PLAN`, `plan diff A B`."""
    from reap_serve.cli.output import note, print_json
    from reap_serve.model import open_model
    from reap_serve.plan.decision import decide, gather
    from reap_serve.plan.limits import ServingTarget
    from reap_serve.plan.model_limits import limits_of_model, limits_of_statistics
    from reap_serve.plan.planner import format_plan, make_plan
    from reap_serve.plan.request import PlanRequest, Size
    from reap_serve.publish import refuse_existing, write_file
    from reap_serve.statistics.merge import merge_files

    refuse_existing(output, overwrite)
    size = Size(keep_fraction, keep_experts, target_bytes)
    request = PlanRequest(
        size=size,
        criterion=criterion,
        seed=seed,
        mix={} if mix is None else parse_mix(mix),
        objective=objective.value,
        budget=budget.value,
        pad_to_max=pad_to_max,
        target=ServingTarget(multiple_of, tensor_parallel_size, expert_parallel_size, moe_backend),
        preserve_super_experts=preserve_super_experts,
        min_tokens=min_tokens,
        unseen=unseen.value,
    )
    statistics = merge_files(stats)
    header = statistics.header
    limits = limits_of_statistics(header) if model is None else limits_of_model(header, open_model(model))
    evidence = gather(statistics, request, limits)
    plan = make_plan(header, evidence, decide(evidence, size))
    write_file(output, format_plan(plan), overwrite=overwrite)
    if as_json:
        print_json({"output": str(output), **plan.model_dump(mode="json")})
    else:
        _print_summary(plan)
        note(f"wrote {output}")


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


def _print_summary(plan: Plan) -> None:
    from rich.table import Table

    from reap_serve.cli.output import note, stdout
    from reap_serve.plan.summary import summary_of

    summary = summary_of(plan)
    fewest, most = min(summary.keep_experts_per_layer), summary.keep_experts
    kept = str(most) if fewest == most else f"{fewest} to {most}"
    table = Table(title=f"{kept} of {summary.num_experts} experts per layer, by {plan.criterion}")
    table.add_column("slice")
    table.add_column("retained saliency", justify="right")
    table.add_column("retained output", justify="right")
    for name, fraction in summary.retained_saliency.slices.items():
        table.add_row(name, f"{fraction:.1%}", f"{summary.retained_output[name]:.1%}")
    stdout.print(table)
    for line in summary.notes:
        note(f"note: {line}")
