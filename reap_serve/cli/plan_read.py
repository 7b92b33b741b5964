"""`reap-serve plan show`, `plan diff` and `plan plot`: what plans say."""

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
    """Draw a plan: saliency by layer and expert with the cut, retained saliency, overlap between slices."""
    from reap_serve.cli.output import note
    from reap_serve.plan.figure import plan_figure
    from reap_serve.plan.record import read_plan
    from reap_serve.publish import refuse_existing, write_file

    refuse_existing(output, overwrite)
    write_file(output, plan_figure(read_plan(plan_path)).encode(), overwrite=overwrite)
    note(f"wrote {output}")
