"""The `reap-serve` program: one command a stage, in the order in which they are used."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from reap_serve import __version__
from reap_serve.errors import ReapServeError

app = typer.Typer(
    name="reap-serve",
    help="Prune the experts of a Mixture-of-Experts model by the traffic that it serves, on stock vLLM.",
    add_completion=False,
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
    """Prune the experts of a Mixture-of-Experts model by the traffic that it serves, on stock vLLM."""


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
    """Entry point: runs a command and turns every expected failure into one line and an exit code."""
    _register()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(args=arguments or ["--help"], prog_name="reap-serve", standalone_mode=False)
        sys.stdout.flush()
    except ReapServeError as error:
        sys.exit(_fail(str(error), error.exit_code, debug))
    except typer.TyperException as error:
        sys.exit(_fail(f"{error.format_message().rstrip('.')}; see {_command_of(error)} --help", 2, debug))
    except typer.Abort:
        sys.exit(_fail("interrupted; run the command again", 130, debug))
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`): not our failure; keep the interpreter from reporting it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _command_of(error: typer.TyperException) -> str:
    # typer.Context is a subclass of what errors carry, which typer does not export.
    path = getattr(getattr(error, "ctx", None), "command_path", None)
    return path if isinstance(path, str) else "reap-serve"


def _fail(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return exit_code
