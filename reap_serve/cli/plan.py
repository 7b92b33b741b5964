"""`reap-serve plan`: which experts stay. `plan_read` adds the commands that read plans."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from reap_serve.cli.app import app
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from reap_serve.plan.decision import Evidence
    from reap_serve.plan.request import PlanRequest
    from reap_serve.plan.sizes import CheckpointBytes
    from reap_serve.statistics.record import Header

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
    output: Annotated[Path | None, typer.Option(help="The plan to write.")] = None,
    keep_fraction: Annotated[
        float | None, typer.Option(help="Fraction of each layer's experts to keep; halves round up.")
    ] = None,
    keep_experts: Annotated[int | None, typer.Option(help="Experts to keep in each layer.")] = None,
    target_bytes: Annotated[int | None, typer.Option(help="Largest checkpoint, in bytes of tensors.")] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="F,F,...", help="Print the trade-off of these keep fractions; write no plan.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model, for its group limits and tensor sizes.")
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="reap, frequency, gate_sum, ean_sum, ean_mean, weighted_ean_sum, msan or random.",
        ),
    ] = "reap",
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
    max_instability: Annotated[
        float | None,
        typer.Option(help="Largest expected fraction of decisions that as much traffic again would change."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Plan also where the statistics are too few.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Choose the experts that stay, from statistics.

    Further commands: `plan show PLAN`, `plan diff A B`, `plan plot PLAN --output SVG`.
    """
    from reap_serve.plan.limits import ServingTarget
    from reap_serve.plan.request import PlanRequest, Size

    target = ServingTarget(multiple_of, tensor_parallel_size, expert_parallel_size, moe_backend)

    def request_of(size: Size) -> PlanRequest:
        return PlanRequest(
            size=size,
            criterion=criterion,
            seed=seed,
            mix={} if mix is None else parse_mix(mix),
            objective=objective.value,
            budget=budget.value,
            pad_to_max=pad_to_max,
            target=target,
            preserve_super_experts=preserve_super_experts,
            min_tokens=min_tokens,
            unseen=unseen.value,
            max_instability=max_instability,
            force=force,
        )

    if sweep is not None:
        if output is not None or (keep_fraction, keep_experts, target_bytes) != (None, None, None):
            raise RequestError("--sweep writes no plan", "leave out --output and the other sizes")
        fractions = parse_fractions(sweep)
        _sweep(stats, model, request_of(Size(keep_fraction=fractions[0])), fractions, as_json)
        return
    if output is None:
        raise RequestError("--output is missing", "say where to write the plan, or ask for --sweep")
    _make(stats, model, request_of(Size(keep_fraction, keep_experts, target_bytes)), output, overwrite, as_json)


def _make(
    stats: list[str], model: str | None, request: PlanRequest, output: Path, overwrite: bool, as_json: bool
) -> None:
    from reap_serve.cli.output import note, print_json
    from reap_serve.cli.plan_tables import print_plan
    from reap_serve.plan.decision import decide
    from reap_serve.plan.planner import format_plan, make_plan
    from reap_serve.plan.stability import require_stable
    from reap_serve.publish import refuse_existing, write_file

    refuse_existing(output, overwrite)
    header, evidence, checkpoint = _gather(stats, model, request)
    decision = decide(evidence, request.size, checkpoint)
    require_stable(evidence, decision)
    plan = make_plan(header, evidence, decision, checkpoint)
    write_file(output, format_plan(plan), overwrite=overwrite)
    if as_json:
        print_json({"output": str(output), **plan.model_dump(mode="json")})
    else:
        print_plan(plan)
        note(f"wrote {output}")


def _sweep(stats: list[str], model: str | None, request: PlanRequest, fractions: list[float], as_json: bool) -> None:
    from reap_serve.cli.output import print_json
    from reap_serve.cli.plan_tables import print_sweep
    from reap_serve.plan.sweep import sweep

    _, evidence, checkpoint = _gather(stats, model, request)
    rows = sweep(evidence, fractions, checkpoint)
    if as_json:
        print_json(
            {
                "criterion": request.criterion,
                "objective": request.objective,
                "budget": request.budget,
                "num_experts": evidence.model.num_experts,
                "bytes_before": None if checkpoint is None else checkpoint.at_uniform(evidence.model.num_experts),
                "rows": [row.model_dump(mode="json") for row in rows],
            }
        )
    else:
        print_sweep(rows, evidence.model.num_experts)


def _gather(
    stats: list[str], model: str | None, request: PlanRequest
) -> tuple[Header, Evidence, CheckpointBytes | None]:
    from reap_serve.model import open_model
    from reap_serve.plan.decision import gather
    from reap_serve.plan.model_limits import limits_of_model, limits_of_statistics
    from reap_serve.plan.sizes import measure_checkpoint
    from reap_serve.statistics.merge import merge_files

    statistics = merge_files(stats)
    header = statistics.header
    if model is None:
        return header, gather(statistics, request, limits_of_statistics(header)), None
    source = open_model(model)
    return header, gather(statistics, request, limits_of_model(header, source)), measure_checkpoint(source)


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
