"""`reap-serve cycle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note, print_json, stdout


@app.command("cycle")
def cycle(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file: reap_serve/cycle/README.md.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run the loop once as a job: windows, drift, plan, mask, prune, verify, compare, decision. Never switches traffic.

    Exit 0: nothing to do, or a candidate is ready. Exit 1: refused by a limit, or failed; run it again to go on.
    """
    from reap_serve.cycle.run import run_cycle

    decision = run_cycle(config, note)
    if as_json:
        document = decision.model_dump(mode="json", exclude={"provenance", "schema_version"})
        print_json(document)
    else:
        stdout.print(f"{decision.decision}: {decision.reason}")
        for name, path in (("candidate", decision.candidate), ("report", decision.report)):
            if path is not None:
                stdout.print(f"{name}: {path}")
    if decision.decision == "refused":
        raise typer.Exit(1)
