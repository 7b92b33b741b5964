"""What `reap-serve serve` would become for the arguments in a deployment's file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

import reap_serve.cli.serve  # noqa: F401 - defines the command
from reap_serve import model
from reap_serve.cli.app import app
from reap_serve.record.settings import CONFIG_KEY, ObserveSettings
from reap_serve.serve import become
from reap_serve.serve.command import ServerCommand


@dataclass(frozen=True, slots=True)
class ServeLine:
    """A server's command line, as reap-serve reads it.

    Attributes:
        settings: What observation is told.
        vllm: What vLLM is told.
    """

    settings: ObserveSettings
    vllm: Sequence[str]


def settings_in(additional_config: str) -> ObserveSettings:
    """The settings in the value of `--additional-config`."""
    return ObserveSettings.model_validate(json.loads(additional_config)[CONFIG_KEY])


def serve_line(arguments: Sequence[str], values: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> ServeLine:
    """Runs the command up to where it would become vLLM; `$(NAME)` and `${NAME...}` are taken from `values`."""
    commands: list[ServerCommand] = []
    monkeypatch.setattr(become, "become", commands.append)
    # The volumes of the deployment are not here.
    monkeypatch.setattr(model, "require_path", lambda reference: None)
    given = [
        next((values[name] for name in values if each.startswith((f"$({name})", f"${{{name}"))), each)
        for each in arguments
    ]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (command,) = commands
    index = command.arguments.index("--additional-config")
    return ServeLine(settings_in(command.arguments[index + 1]), command.arguments[1:])
