"""The `reap-serve` program: one command a stage, in the order in which they are used."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from reap_serve import __version__
from reap_serve.cli.boundary import run_command
from reap_serve.cli.output import stdout

# In the order of use: the loop, then the loop as a job, then what stands beside it.
ORDER = (
    *("demo", "observe", "serve", "stats", "plan", "prune", "verify", "compare", "tune", "cycle"),
    *("traffic", "replay", "merge", "doctor"),
)


# The exit code of Ctrl-C.
INTERRUPTED = 130


class Commands(TyperGroup):
    """The commands in the order in which they are used."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Names for the help."""
        known = [name for name in ORDER if name in self.commands]
        return [*known, *(name for name in self.commands if name not in known)]


app = typer.Typer(
    name="reap-serve",
    cls=Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"reap-serve {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Add the traceback to an error. Stands anywhere.")] = False,
) -> None:
    """Prune the experts of a Mixture-of-Experts model by the traffic that it serves, on stock vLLM.

    \b
    reap-serve observe MODEL traffic.jsonl -o week.stats
    reap-serve plan week.stats --keep-fraction 0.75 -o plan.json
    reap-serve prune MODEL plan.json PRUNED
    reap-serve verify PRUNED --source MODEL --plan plan.json
    reap-serve compare MODEL PRUNED heldout.jsonl -o report
    """


def _register() -> None:
    """Imports the command modules; each registers its commands on `app`, in the order of use."""
    from reap_serve.cli import (  # noqa: F401
        compare,
        cycle,
        demo,
        doctor,
        merge,
        observe,
        plan,
        plan_read,
        prune,
        replay,
        serve,
        stats,
        stats_drift,
        stats_subspace,
        traffic,
        tune,
        verify,
    )


def main() -> None:
    """Entry point: runs a command; its failure becomes one line and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]

    def command() -> object:
        stdout.stderr = False
        _register()
        code = app(args=arguments, prog_name="reap-serve", standalone_mode=False)
        if code == INTERRUPTED:
            # What typer makes of Ctrl-C, without a word.
            raise KeyboardInterrupt
        return code

    sys.exit(run_command(command, debug=debug))
