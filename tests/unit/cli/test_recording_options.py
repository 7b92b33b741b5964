"""What the options of `serve` and `observe` that choose a recorder hand on, and what they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest

pytest.importorskip("vllm")

from reap_serve.adapter import fit, offline
from reap_serve.cli import observe as cli_observe
from reap_serve.cli import serve as cli_serve
from reap_serve.cli.app import main
from reap_serve.errors import EngineError
from reap_serve.record.settings import CONFIG_KEY, ObserveSettings, RecorderName
from reap_serve.serve import become


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program, in this process."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["reap-serve", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return Done(int(ended.value.code or 0), told.out, told.err)

    return run


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Commands that `serve` would have become."""
    commands: list[Any] = []
    monkeypatch.setattr(become, "become", commands.append)
    monkeypatch.setattr(fit, "require_fit", lambda: None)
    return commands


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> list[ObserveSettings]:
    """Settings of engines that `observe` would have started."""
    asked: list[ObserveSettings] = []

    def observe_traffic(source: object, requests: object, settings: ObserveSettings, *rest: object) -> None:
        asked.append(settings)
        raise EngineError("no engine is started", "this is a test")

    monkeypatch.setattr(offline, "observe_traffic", observe_traffic)
    return asked


@pytest.fixture
def serve(served: list[Any], run: Run) -> Callable[..., dict[str, Any]]:
    """The settings that `serve` with some options gives an engine."""

    def serve(*options: str) -> dict[str, Any]:
        done = run("serve", "org/model", "--observe", "stats", *options)
        assert done.exit_code == 0, done.stderr
        return settings_of(served.pop())

    return serve


def settings_of(command: Any) -> dict[str, Any]:
    """What a command hands on, as the engine accepts it."""
    arguments = command.arguments
    settings: dict[str, Any] = json.loads(arguments[arguments.index("--additional-config") + 1])[CONFIG_KEY]
    ObserveSettings.model_validate(settings)
    return settings


def test_serve_needs_no_option(serve: Callable[..., dict[str, Any]]) -> None:
    settings = serve()
    chosen = ("recorder", "overhead_budget", "keep_kernel", "minimum_tokens", "recording")
    assert {name: settings[name] for name in chosen} == {
        "recorder": "auto",
        "overhead_budget": 0.02,
        "keep_kernel": False,
        "minimum_tokens": 1000,
        "recording": True,
    }


@pytest.mark.parametrize("command", [cli_observe.observe, cli_serve.serve])
def test_commands_know_the_recorders_that_settings_know(command: Callable[..., None]) -> None:
    choices, _ = get_args(get_type_hints(command, include_extras=True)["recorder"])
    assert choices == RecorderName


@pytest.mark.parametrize("recorder", get_args(RecorderName))
def test_every_recorder_can_be_named(serve: Callable[..., dict[str, Any]], recorder: str) -> None:
    assert serve("--recorder", recorder)["recorder"] == recorder


def test_a_short_trial_records_and_writes_all_there_is(serve: Callable[..., dict[str, Any]]) -> None:
    settings = serve("--overhead-budget", "none", "--minimum-tokens", "0", "--keep-kernel")
    assert (settings["overhead_budget"], settings["minimum_tokens"], settings["keep_kernel"]) == (None, 0, True)


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    """A plan by hand."""
    file = tmp_path / "plan.json"
    file.write_text(
        '{"schema_version": 1, "model": {}, "criterion": "by hand", "layers": '
        '[{"layer": "model.layers.0.mlp.experts", "index": 0, "kept": [0], "dropped": [1]}]}'
    )
    return str(file)


def test_plans_have_places_in_graphs(serve: Callable[..., dict[str, Any]], plan_file: str) -> None:
    named = ("--plan", f"a={plan_file}", "--mask", plan_file, "--mask-phase", "decode")
    for options, places in (((), 0), (named, 3), ((*named, "--mask-places", "2"), 2), (("--mask-places", "4"), 4)):
        assert ObserveSettings.model_validate(serve(*options)).places_in_graphs == places
    settings = serve(*named)
    assert (settings["mask"], settings["mask_phase"]) == ("plan", "decode")


def test_more_plans_than_places_are_refused(served: list[Any], run: Run, plan_file: str) -> None:
    options = ("--mask", plan_file, "--mask-places")
    done = run("serve", "org/model", *options, "0")
    assert (done.exit_code, served) == (2, [])
    assert done.stderr == "error: --mask-places 0 has no room for 1 plans; give 1 or more\n"
    assert run("serve", "org/model", *options, "1").exit_code == 0


def test_serve_says_what_recording_may_take(served: list[Any], run: Run) -> None:
    assert "at most 0.02 of the engine" in run("serve", "org/model", "--observe", "stats").stderr
    assert "at most" not in run("serve", "org/model", "--observe", "stats", "--overhead-budget", "none").stderr


def test_a_name_without_a_slash_is_a_directory_or_nothing(
    served: list[Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("serve", "nobase")
    assert (done.exit_code, done.stdout, served) == (2, "", [])
    assert done.stderr == "error: model nobase does not exist; give a local directory or a hub id org/name\n"
    (tmp_path / "nobase").mkdir()
    assert run("serve", "nobase").exit_code == run("serve", "org/nobase").exit_code == 0
    assert len(served) == 2


def test_serve_refuses_what_cannot_be_before_vllm_starts(served: list[Any], run: Run, tmp_path: Path) -> None:
    file = tmp_path / "code.jsonl"
    file.write_text("{}\n")
    for place in (file, file / "stats"):
        done = run("serve", "org/model", "--observe", str(place))
        assert (done.exit_code, done.stdout, served) == (2, "", [])
        assert done.stderr == f"error: {file} is no folder, and statistics files go to one; give another folder\n"


REFUSED = [
    ((*("serve", "org/model"), "--overhead-budget", "0"), "--overhead-budget 0 is not in (0, 1); give a fraction"),
    ((*("serve", "org/model"), "--overhead-budget", "1"), "--overhead-budget 1 is not in (0, 1); give a fraction"),
    ((*("serve", "org/model"), "--overhead-budget", "much"), "--overhead-budget much is not in (0, 1)"),
    ((*("serve", "org/model"), "--overhead-budget", "nan"), "--overhead-budget nan is not in (0, 1)"),
    ((*("serve", "org/model"), "--minimum-tokens", "-1"), "--minimum-tokens -1 is negative; give 0 or more"),
    ((*("serve", "org/model"), "--mask-places", "33"), "Invalid value for '--mask-places'"),
    ((*("observe", "org/model", "x.jsonl", "-o", "s"), "--sample-fraction", "0"), "--sample-fraction 0.0 is not in"),
    ((*("observe", "org/model", "x.jsonl", "-o", "s"), "--max-model-len", "0"), "Invalid value for '--max-model-len'"),
    ((*("observe", "org/model", "x.jsonl", "-o", "s"), "--max-model-len", "-3"), "Invalid value for '--max-model-len'"),
    (("replay", "x.jsonl", "--url", "nonsense"), "nonsense is no URL of an endpoint; give http://host:port"),
    (("replay", "x.jsonl", "--url", "http://:80"), "http://:80 is no URL of an endpoint"),
    (("replay", "x.jsonl", "--url", "http://a:99999"), "http://a:99999 is no URL of an endpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_wrong_value_is_one_line_and_exit_2(
    served: list[Any], run: Run, arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout, served) == (2, "", [])
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("serve", "org/model"), ("observe", "org/model", "x.jsonl", "-o", "s")])
def test_an_unknown_recorder_is_answered_by_those_that_exist(run: Run, command: tuple[str, ...]) -> None:
    done = run(*command, "--recorder", "outline")
    assert (done.exit_code, done.stdout) == (2, "")
    for name in ("auto", "inline", "deferred", "moe_sum"):
        assert name in done.stderr


@pytest.fixture
def model(tmp_path: Path) -> str:
    """As much of a model as is read before an engine starts."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        '{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}'
    )
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ((), {"recorder": "auto", "sample_fraction": 1.0, "keep_kernel": False}),
        (("--recorder", "moe_sum"), {"recorder": "moe_sum"}),
        (("--recorder", "deferred", "--sample-fraction", "0.5"), {"recorder": "deferred", "sample_fraction": 0.5}),
        (("--keep-kernel",), {"keep_kernel": True}),
    ],
)
def test_observe_hands_on_what_it_was_asked(
    observed: list[ObserveSettings],
    run: Run,
    model: str,
    tmp_path: Path,
    options: tuple[str, ...],
    changed: dict[str, object],
) -> None:
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text('{"messages": [{"role": "user", "content": "a"}], "model": "m"}\n')
    output = tmp_path / "out.stats"
    done = run("observe", model, str(traffic), "--output", str(output), "--json", *options)
    # What the engine refuses is said in one line, and nothing is written.
    assert done == (1, "", "error: no engine is started; this is a test\n")
    assert not output.exists()
    (settings,) = observed
    assert {name: getattr(settings, name) for name in changed} == changed
    # Nobody is served: no budget bounds what is recorded, and outputs may differ in the last bit.
    assert (settings.overhead_budget, settings.outputs_served) == (None, False)
