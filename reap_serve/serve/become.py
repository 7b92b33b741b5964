"""Becomes vLLM's server: the same process, so that signals, exit code and logs are its own."""

from __future__ import annotations

import os
import shlex
import sys
from typing import NoReturn

from reap_serve.errors import EngineError
from reap_serve.serve.command import ServerCommand
from reap_serve.serve.vllm_options import redacted


def shell_line(command: ServerCommand) -> str:
    """The command as a line that a shell would run, but for secrets, which logs should not hold."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(command.environment.items()))
    return f"{variables} {shlex.join(redacted(command.arguments))}"


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
