"""`reap-serve doctor`."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note, print_json, progress_bar, stdout

if TYPE_CHECKING:
    from reap_serve.adapter.doctor import Examination


@app.command("doctor")
def doctor(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the engines of the self-tests log.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check what is installed, and test the recorders on this machine. Exit 1 when something is wrong."""
    if verbose:
        from reap_serve.adapter.doctor import examine
        from reap_serve.adapter.engine_log import stdout_to_stderr

        with stdout_to_stderr():
            found = examine()
    else:
        found = _examine_quietly()
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


def _examine_quietly() -> Examination:
    """Keeps the engines' log from the terminal, and names the file of it where something is wrong."""
    from reap_serve.adapter.doctor import NUM_STEPS, examine
    from reap_serve.adapter.engine_log import output_to

    found: Examination | None = None
    with tempfile.NamedTemporaryFile(prefix="reap-serve-doctor-", suffix=".log", delete=False) as log:
        try:
            with progress_bar(apart=True) as bar, output_to(log.file):
                task = bar.add_task("", total=NUM_STEPS, completed=-1)
                found = examine(lambda what: bar.update(task, description=what, advance=1))
        finally:
            if found is not None and found.ok:
                os.unlink(log.name)
            else:
                note(f"what the engines logged is in {log.name}; --verbose shows it")
    return found
