"""A minute of damaged inputs, and what the fuzzer found before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "bench"


@pytest.mark.timeout(600)
def test_a_minute_of_damaged_inputs() -> None:
    done = subprocess.run(
        [sys.executable, BENCH / "fuzz.py", "--minutes", "1", "--count", "5000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["failed"] == 0
    assert summary["inputs"] >= len(summary["targets"])
    assert len(summary["targets"]) == 8


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, statistics and a plan that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("fuzz") / "sound"
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); from fuzz_inputs import Inputs; from pathlib import Path;"
    subprocess.run([sys.executable, "-c", f"{code} Inputs(Path({str(folder)!r}))"], check=True)
    return folder


def reap_serve(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reap_serve", *map(str, words)], capture_output=True, text=True, check=False
    )


def refused(*words: object) -> str:
    """The one line of a command that finds its request wrong."""
    done = reap_serve(*words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place."""
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", [("layers", 0, "saliency", 0), ("summary", "keep_fraction"), ("provenance", "x")])
def test_a_plan_with_a_number_that_json_has_not(
    sound: Path, tmp_path: Path, path: tuple[Any, ...], number: float
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(with_value(json.loads((sound / "plan.json").read_text()), path, number)))
    assert "not finite" in refused("plan", "show", plan, "--json")


def forget_slice(plan: Any) -> None:
    del plan["summary"]["retained_output"]["chat"]


def rename_slice(plan: Any) -> None:
    slices = plan["summary"]["retained_saliency"]["slices"]
    slices["a\nerror: forged; nothing"] = slices.pop("chat")


def cut_overlap(plan: Any) -> None:
    plan["summary"]["slice_overlap"][0] = []


@pytest.mark.parametrize("damage", [forget_slice, rename_slice, cut_overlap])
def test_a_plan_whose_predictions_contradict_each_other(
    sound: Path, tmp_path: Path, damage: Callable[[Any], None]
) -> None:
    document = json.loads((sound / "plan.json").read_text())
    damage(document)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(document))
    # It is shown and drawn like one that was written by hand: without predictions.
    for words in (("plan", "show", plan), ("plan", "plot", plan, "--output", tmp_path / "plan.svg")):
        done = reap_serve(*words)
        assert done.returncode == 0, done.stderr
        assert "retained output" not in done.stdout


def damaged_model(sound: Path, tmp_path: Path, name: str, content: str) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for file in (sound / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / name).write_text(content)
    return model


@pytest.mark.parametrize("name", ["\ud800", "../outside", "/etc/passwd", "x" * 300, "a\u0000b"])
def test_an_index_that_names_what_cannot_be_a_file(sound: Path, tmp_path: Path, name: str) -> None:
    index = json.loads((sound / "model" / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    model = damaged_model(sound, tmp_path, "model.safetensors.index.json", json.dumps(index))
    refused("plan", sound / "other.safetensors", "--model", model, "--sweep", "0.5")
    refused("prune", model, sound / "plan.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [[[0]], [{}], ["0"]])
def test_a_config_whose_dense_layers_are_no_indices(sound: Path, tmp_path: Path, value: Any) -> None:
    config = json.loads((sound / "model" / "config.json").read_text()) | {"mlp_only_layers": value}
    model = damaged_model(sound, tmp_path, "config.json", json.dumps(config))
    assert "mlp_only_layers" in refused("prune", model, sound / "plan.json", tmp_path / "out")


@pytest.mark.parametrize("depth", [150, 900, 100_000])
def test_a_config_that_is_nested_too_deeply(sound: Path, tmp_path: Path, depth: int) -> None:
    text = (sound / "model" / "config.json").read_text().rstrip()[:-1]
    model = damaged_model(sound, tmp_path, "config.json", f'{text}, "deep": {"[" * depth}{"]" * depth}}}')
    refused("prune", model, sound / "plan.json", tmp_path / "out")


def test_a_config_with_half_of_a_surrogate_pair_is_carried(sound: Path, tmp_path: Path) -> None:
    """UTF-8 has none: config.json keeps it as an escape, the card shows one."""
    config = json.loads((sound / "model" / "config.json").read_text()) | {"_name_or_path": "a\ud800b"}
    config["license\ud800"] = "\ud800"
    model = damaged_model(sound, tmp_path, "config.json", json.dumps(config))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(json.loads((sound / "plan.json").read_text()) | {"model": {}, "criterion": "by \ud800"}))
    done = reap_serve("prune", model, plan, tmp_path / "out")
    assert "defect" not in done.stderr
    assert (done.returncode == 0) == (tmp_path / "out").exists()
