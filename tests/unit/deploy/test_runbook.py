"""Every command of the runbook exists with its options, every route is served, every file it names is there."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from known_metrics import DEPLOY, exposed, rules
from typer.core import TyperGroup

TEXT = (DEPLOY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]
# Those that `serve` hands on to vLLM.
OF_VLLM = {"--host", "--port"}


def program() -> TyperGroup:
    """The whole program with its commands."""
    from reap_serve.cli.app import _register, app

    _register()
    found = typer.main.get_command(app)
    assert isinstance(found, TyperGroup)
    return found


@pytest.mark.parametrize(
    "line", [line for line in LINES if line[0] == "reap-serve"], ids=lambda line: " ".join(line[1:3])
)
def test_the_command_takes_these_options(line: list[str]) -> None:
    command, words = program(), line[1:]
    while isinstance(command, TyperGroup):
        # `plan STATS...` stands for `plan make STATS...`.
        command = command.commands[words.pop(0) if words[0] in command.commands else "make"]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} - OF_VLLM <= known


def test_routes_are_served() -> None:
    pytest.importorskip("fastapi")
    from reap_serve.serve.routes import router

    served = {(method, route.path) for route in router.routes for method in getattr(route, "methods", ())}
    named = set(re.findall(r"`(PUT|DELETE) (/v1/reap/\w+)`", TEXT))
    named |= {
        (line[line.index("-X") + 1] if "-X" in line else "GET", "/v1/reap" + line[-1].partition("/v1/reap")[2])
        for line in LINES
        if line[0] == "curl"
    }
    assert len(named) == 4
    for method, path in named:
        assert (method, path) in served or (method, "/v1/reap/{action}") in served


def test_files_and_alerts_are_there() -> None:
    for line in LINES:
        if line[:2] == ["kubectl", "apply"]:
            assert (DEPLOY.parent / line[-1] / "kustomization.yaml").is_file()
    alerts = [rule["alert"] for rule in rules("alerts.yml")]
    for name in re.findall(r"`(Reap\w+)\*?`", TEXT):
        assert any(alert.startswith(name) for alert in alerts), name


def test_series_exist() -> None:
    pytest.importorskip("vllm")
    assert set(re.findall(r"`(vllm:\w+|reap_serve_\w+)`", TEXT)) <= exposed()
