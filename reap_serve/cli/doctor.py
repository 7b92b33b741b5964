"""`reap-serve doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import print_json, stdout


@app.command("doctor")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Check what is installed, and test the recorders on this machine. Exit 1 when something is wrong."""
    from reap_serve.adapter.doctor import examine
    from reap_serve.adapter.offline import stdout_to_stderr

    with stdout_to_stderr():
        found = examine()
    if as_json:
        print_json(found)
    else:
        for name, version in found.versions.items():
            stdout.print(f"{name} {version}")
        for problem in found.seam_problems:
            stdout.print(f"wrong: {problem}")
        if not found.seam_problems:
            stdout.print(f"vLLM's seams are as this release expects; device {found.device}")
        for defect in found.defects:
            mended = f"mended by {defect.patch}" if defect.patch else "no patch mends it"
            stdout.print(f"defect {defect.name}: {defect.what}; {mended}; {defect.consequence}")
        for test in found.self_tests:
            verdict = "right" if test.passed else "wrong"
            stdout.print(f"{verdict}: recorder {test.recorder} on {test.kernel}: {test.detail} ({test.seconds} s)")
    if not found.ok:
        raise typer.Exit(1)
