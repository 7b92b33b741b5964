"""Becomes vLLM's server: the same process, so that signals, exit code and logs are its own."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from reap_serve.errors import EngineError
from reap_serve.serve.command import ServerCommand

API_KEY = "--api-key"


def shell_line(command: ServerCommand) -> str:
    """The command as a line that a shell would run, but for keys, which logs should not hold."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(command.environment.items()))
    return f"{variables} {shlex.join(_without_keys(command.arguments))}"


def _without_keys(arguments: Sequence[str]) -> list[str]:
    shown: list[str] = []
    in_keys = False
    for argument in arguments:
        # `--api-key` takes several values.
        in_keys = argument == API_KEY or (in_keys and not argument.startswith("-"))
        if argument.startswith(f"{API_KEY}="):
            argument = f"{API_KEY}=***"
        shown.append("***" if in_keys and argument != API_KEY else argument)
    return shown


def become(command: ServerCommand) -> NoReturn:
    """Replaces this process by the server.

    Raises:
        EngineError: The program cannot be run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(command.arguments[0], list(command.arguments), {**os.environ, **command.environment})
    except OSError as error:
        raise EngineError(f"{command.arguments[0]} cannot be run: {error.strerror}", "check the installation") from None
