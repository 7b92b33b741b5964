"""A vLLM that lacks a name is refused by commands and engines that observe, and by no other."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from reap_serve.adapter import fit, plugin
from reap_serve.errors import EngineError


@pytest.fixture
def misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed vLLM lacks a name."""
    monkeypatch.setattr(fit, "installed_problems", lambda: ("MoERunner has no _forward_entry",))


def test_commands_refuse_a_vllm_that_does_not_fit(misfit: None) -> None:
    with pytest.raises(EngineError, match=r"MoERunner has no _forward_entry; install vLLM 0\.31 or 0\.32 or 0\.33"):
        fit.require_fit()


def test_serve_refuses_it_before_it_becomes_vllm(misfit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    import reap_serve.cli.serve  # noqa: F401 - defines the command
    from reap_serve.cli.app import app
    from reap_serve.serve import become

    started: list[object] = []
    monkeypatch.setattr(become, "become", started.append)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert isinstance(result.exception, EngineError)
    assert "MoERunner has no _forward_entry" in str(result.exception)
    assert started == []


class Runner:
    """A model runner that was never observed."""

    def __init__(self, additional: object) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional)
        self.loaded = False

    def load_model(self) -> None:
        self.loaded = True


def test_an_engine_that_asks_for_observation_is_refused_in_a_vllm_that_does_not_fit(
    misfit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Observed(Runner):
        pass

    module: Any = ModuleType("vllm_runner_of_a_test")
    module.Observed = Observed
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    monkeypatch.setattr(fit, "LOADERS", (("no_such_module", "Runner"), (module.__name__, "Observed")))
    plugin.register()
    plain = Observed({})
    plain.load_model()
    assert plain.loaded
    with pytest.raises(EngineError, match="MoERunner has no _forward_entry"):
        Observed({fit.CONFIG_KEY: {}}).load_model()


def test_a_vllm_without_a_place_to_refuse_is_told_in_the_log(
    misfit: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fit, "LOADERS", (("no_such_module", "Runner"),))
    with caplog.at_level(logging.ERROR, "reap_serve"):
        plugin.register()
    assert [record.message for record in caplog.records] == [
        "nothing is observed: vLLM does not fit: MoERunner has no _forward_entry"
    ]
