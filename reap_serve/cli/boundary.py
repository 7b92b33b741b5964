"""Where every failure ends: as one line and an exit code, whoever foresaw it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

import typer

from reap_serve.errors import ReapServeError
from reap_serve.shown_text import shown

# What the operating system says of a name that cannot be one, or that leads to no such thing: the request is wrong.
_WRONG_PATHS = frozenset(
    {
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.EINVAL,
        errno.EACCES,
        errno.EPERM,
    }
)

# What the core does without, and the extra that has it.
_OPTIONAL = {
    **dict.fromkeys(
        ("vllm", "torch", "transformers", "httpx", "scipy", "openai", "prometheus_client", "psutil"), "cpu"
    ),
    **dict.fromkeys(("jinja2", "plotly"), "report"),
}


def run_command(command: Callable[[], object], *, debug: bool) -> int:
    """Runs a command to its exit code; its failure becomes one line on stderr.

    Args:
        command: What to run; an integer that it returns is the exit code.
        debug: Print the traceback before that line.
    """
    # A name with bytes that are no text is shown by escapes instead of failing while it is printed.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`): not our failure; keep the interpreter from reporting it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the boundary: no failure ends as a traceback
        if debug:
            for line in traceback.format_exc().splitlines():
                sys.stderr.write(f"{shown(line)}\n")
        message, exit_code = describe(error)
        sys.stderr.write(f"error: {shown(' '.join(message.split()))}\n")
        return exit_code
    return code if isinstance(code, int) else 0


def describe(error: BaseException) -> tuple[str, int]:
    """What to say of a failure, and the exit code."""
    if isinstance(error, ReapServeError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        return f"{error.format_message().rstrip('.')}; see {_command_of(error)} --help", 2
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return "interrupted; run the command again", 130
    if isinstance(error, ModuleNotFoundError) and error.name in _OPTIONAL:
        return f"this needs the {error.name} package; pip install 'reap-serve[{_OPTIONAL[error.name]}]'", 1
    if isinstance(error, MemoryError):
        return "the memory does not suffice; free some, or use a machine with more", 1
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        exit_code = 2 if error.errno in _WRONG_PATHS else 1
        return f"{place}{error.strerror}; check the path, its permissions and the disk", exit_code
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"this is a defect: {what[:500]}; run again with --debug and report it", 1


def _command_of(error: typer.TyperException) -> str:
    # typer.Context is a subclass of what errors carry, which typer does not export.
    path = getattr(getattr(error, "ctx", None), "command_path", None)
    return path if isinstance(path, str) else "reap-serve"
