"""`reap-serve plan`: which experts stay. `plan_read` adds the commands that read plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer.core import TyperGroup

from reap_serve.cli import plan_options as options
from reap_serve.cli.app import app
from reap_serve.errors import MismatchError, RequestError

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


@plan_app.command(MAKE)
def make(
    stats: options.Stats,
    output: options.Output = None,
    keep_fraction: options.KeepFraction = None,
    keep_experts: options.KeepExperts = None,
    target_bytes: options.TargetBytes = None,
    sweep: options.Sweep = None,
    model: options.Model = None,
    criterion: options.Criterion = "reap",
    seed: options.Seed = 0,
    mix: options.Mix = None,
    objective: options.ObjectiveOption = options.Objective.MEAN,
    budget: options.BudgetOption = options.Budget.UNIFORM,
    pad_to_max: options.PadToMax = False,
    multiple_of: options.MultipleOf = 1,
    tensor_parallel_size: options.TensorParallelSize = 1,
    expert_parallel_size: options.ExpertParallelSize = 1,
    moe_backend: options.MoeBackend = None,
    preserve_super_experts: options.PreserveSuperExperts = False,
    drop_unsound: options.DropUnsound = None,
    min_tokens: options.MinTokens = 0,
    unseen: options.UnseenOption = options.Unseen.DROP,
    max_instability: options.MaxInstability = None,
    force: options.Force = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Choose the experts that stay, from statistics.

    Further commands: `plan show PLAN`, `plan diff A B`, `plan plot PLAN --output SVG`, and `plan restore PLAN STATS`.
    """
    from reap_serve.plan.limits import ServingTarget
    from reap_serve.plan.request import PlanRequest, Size

    target = ServingTarget(multiple_of, tensor_parallel_size, expert_parallel_size, moe_backend)

    def request_of(size: Size) -> PlanRequest:
        return PlanRequest(
            size=size,
            criterion=criterion,
            seed=seed,
            mix={} if mix is None else options.parse_mix(mix),
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
        fractions = options.parse_fractions(sweep)
        _sweep(stats, model, drop_unsound, request_of(Size(keep_fraction=fractions[0])), fractions, as_json)
        return
    if output is None:
        raise RequestError("--output is missing", "say where to write the plan, or ask for --sweep")
    request = request_of(Size(keep_fraction, keep_experts, target_bytes))
    _make(stats, model, drop_unsound, request, output, overwrite, as_json)


def _make(
    stats: list[str],
    model: str | None,
    drop_unsound: str | None,
    request: PlanRequest,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    from reap_serve.cli.output import keep_stdout_for, note, print_json
    from reap_serve.cli.plan_tables import print_plan
    from reap_serve.file_kinds import PLAN
    from reap_serve.plan.decision import decide
    from reap_serve.plan.instability import refuse_instability, refuse_unjudged
    from reap_serve.plan.planner import format_plan, make_plan
    from reap_serve.publish import refuse_existing, write_file

    keep_stdout_for(output)
    refuse_existing(output, overwrite, PLAN, [*stats, *([] if model is None else [model])])
    header, evidence, checkpoint = gather_evidence(stats, model, request, drop_unsound)
    decision = decide(evidence, request.size, checkpoint)
    for layer, expert in evidence.unsound_kept(decision):
        note(f"warning: layer {layer} keeps expert {expert}: {evidence.unsound[layer, expert]}; keep fewer experts")
    refuse_unjudged(evidence, decision)
    refuse_instability(evidence, decision)
    plan = make_plan(header, evidence, decision, checkpoint)
    write_file(output, format_plan(plan), overwrite=overwrite)
    if as_json:
        print_json({"output": str(output), **plan.model_dump(mode="json")})
    else:
        print_plan(plan)
        note(f"wrote {output}")


def _sweep(
    stats: list[str],
    model: str | None,
    drop_unsound: str | None,
    request: PlanRequest,
    fractions: list[float],
    as_json: bool,
) -> None:
    from reap_serve.cli.output import print_json
    from reap_serve.cli.plan_tables import print_sweep
    from reap_serve.plan.sweep import sweep

    _, evidence, checkpoint = gather_evidence(stats, model, request, drop_unsound)
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


def gather_evidence(
    stats: list[str], model: str | None, request: PlanRequest, drop_unsound: str | None = None
) -> tuple[Header, Evidence, CheckpointBytes | None]:
    """What plans of these statistics rest on, and the sizes of the model where it is given."""
    from reap_serve.model import open_model
    from reap_serve.plan.decision import gather
    from reap_serve.plan.model_limits import limits_of_model, limits_of_statistics
    from reap_serve.plan.sizes import measure_checkpoint
    from reap_serve.statistics.merge import merge_files

    statistics = merge_files(stats)
    header = statistics.header
    unsound = None if drop_unsound is None else _unsound(header, drop_unsound)
    if model is None:
        return header, gather(statistics, request, limits_of_statistics(header), unsound), None
    source = open_model(model)
    return header, gather(statistics, request, limits_of_model(header, source), unsound), measure_checkpoint(source)


def _unsound(header: Header, model: str) -> Mapping[tuple[int, int], str]:
    from reap_serve.model import fingerprint, open_model
    from reap_serve.prune.unsound import unsound_experts

    source = open_model(model)
    wanted, found = header.model, fingerprint(source)
    # Statistics of the model before it was quantised serve, too: its layers and experts are the same.
    for field in ("architecture", "num_layers", "num_experts"):
        if getattr(wanted, field) != getattr(found, field):
            raise MismatchError(
                f"the statistics and {model} belong to different models: {field} is {getattr(wanted, field)} against "
                f"{getattr(found, field)}",
                "give the model that was observed, or its quantised form",
            )
    return unsound_experts(source)
