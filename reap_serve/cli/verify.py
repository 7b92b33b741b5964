"""`reap-serve verify`: whether a pruned checkpoint is what the plan and its source say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import print_json, progress_bar, stdout


@app.command("verify")
def verify_command(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The pruned checkpoint.")],
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="MODEL", help="What it was pruned from: every kept byte is compared."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="PLAN", help="The plan; by default the one in its manifest.")
    ] = None,
    load: Annotated[
        bool, typer.Option("--load", help="Start vLLM on OUTPUT and on the masked source and compare their answers.")
    ] = False,
    ranks: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size", min=1, help="Check that vLLM can share the experts between so many ranks."
        ),
    ] = 1,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Do not read the tensors to compare them with their digests.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check what stock vLLM would not notice. Exit 0 sound, 1 unsound."""
    from reap_serve.prune.verify import verify

    with progress_bar(of_bytes=True) as bar:
        task = bar.add_task("reading", total=sum(path.stat().st_size for path in output.glob("*.safetensors")))
        report = verify(
            output,
            source,
            plan,
            load=load,
            ranks=ranks,
            read_bytes=not headers_only,
            advance=lambda num_bytes: bar.advance(task, num_bytes),
        )
    if as_json:
        print_json(report)
    else:
        for finding in report.findings:
            stdout.print(f"{finding.severity}: {finding.check}: {finding.detail}")
        stdout.print("sound" if report.sound else "unsound")
    if not report.sound:
        raise typer.Exit(1)
