"""`reap-serve plan show`, `plan diff`, `plan plot` and `plan restore`: what plans say, and one made from another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap_serve.cli.plan import plan_app


@plan_app.command("show")
def show(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a plan keeps and drops in each layer, and what it predicts."""
    from reap_serve.cli.output import print_json
    from reap_serve.cli.plan_tables import print_plan
    from reap_serve.plan.record import read_plan

    plan = read_plan(plan_path)
    if as_json:
        print_json(plan)
    else:
        print_plan(plan, layers=True)


@plan_app.command("diff")
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A plan.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another plan of the same model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show which experts two plans decide differently."""
    from reap_serve.cli.output import print_json
    from reap_serve.cli.plan_tables import print_difference
    from reap_serve.plan.difference import difference
    from reap_serve.plan.record import read_plan

    found = difference(read_plan(a), read_plan(b))
    if as_json:
        print_json(found)
    else:
        print_difference(found)


@plan_app.command("plot")
def plot(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The SVG file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Draw a plan: saliency by layer and expert with what is kept, retained saliency, overlap between slices."""
    from reap_serve.cli.output import note
    from reap_serve.file_kinds import PICTURE
    from reap_serve.plan.figure import plan_figure
    from reap_serve.plan.record import read_plan
    from reap_serve.publish import refuse_existing, write_file

    refuse_existing(output, overwrite, PICTURE, [plan_path])
    write_file(output, plan_figure(read_plan(plan_path)).encode(), overwrite=overwrite)
    note(f"wrote {output}")


@plan_app.command("restore")
def restore(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan in use.")],
    stats: Annotated[
        list[str], typer.Argument(metavar="STATS...", help="Statistics of the full model on today's traffic.")
    ],
    experts: Annotated[int, typer.Option("--experts", metavar="K", help="Experts that each layer gets back.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan to write.")],
    model: Annotated[str | None, typer.Option(help="The base, to predict bytes and check counts.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Take back the experts that today's traffic misses most; `prune` makes the checkpoint from the base."""
    from reap_serve.cli.output import keep_stdout_for, note, print_json
    from reap_serve.cli.plan import gather_evidence
    from reap_serve.cli.plan_tables import print_plan
    from reap_serve.file_kinds import PLAN
    from reap_serve.plan.planner import format_plan, make_plan
    from reap_serve.plan.record import read_plan, require_plan_for
    from reap_serve.plan.request import PlanRequest, Size
    from reap_serve.plan.restore import MISSED_BY, restored
    from reap_serve.publish import refuse_existing, write_file

    keep_stdout_for(output)
    refuse_existing(output, overwrite, PLAN, [plan_path, *stats])
    plan = read_plan(plan_path)
    request = PlanRequest(Size(keep_experts=plan.num_kept + max(experts, 1)), MISSED_BY)
    header, evidence, checkpoint = gather_evidence(stats, model, request)
    require_plan_for(plan, header.model, tuple(layer.index for layer in header.layers))
    made = make_plan(header, evidence, restored(plan, evidence, experts), checkpoint)
    write_file(output, format_plan(made), overwrite=overwrite)
    if as_json:
        print_json({"output": str(output), **made.model_dump(mode="json")})
    else:
        print_plan(made)
        note(f"wrote {output}")
