"""`reap-serve prune` and `verify` as processes: the contract's JSON, exit codes, one line for a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint, write_plan

KEPT = {0: [1, 3], 1: [0, 2]}


def reap_serve(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reap_serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_prune_and_verify_speak_json(tmp_path: Path) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    done = reap_serve("prune", source, plan, tmp_path / "out", "--json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert set(document) == {
        "output",
        "tensors",
        "bytes_read",
        "bytes_written",
        "seconds",
        "experts_before",
        "experts_after",
        "left_out",
    }
    assert (document["tensors"], document["experts_before"], document["experts_after"]) == (18, 4, 2)
    assert done.stderr.splitlines() == [
        "warning: the plan is bound to no model; only its layers and counts were compared"
    ]
    sound = reap_serve("verify", tmp_path / "out", "--source", source, "--plan", plan, "--json")
    assert (sound.returncode, json.loads(sound.stdout)) == (0, {"sound": True, "findings": []})
    shared = reap_serve("verify", tmp_path / "out", "--tensor-parallel-size", 4, "--json")
    assert shared.returncode == 1
    assert {finding["check"] for finding in json.loads(shared.stdout)["findings"]} == {"parallel"}
    file = tmp_path / "out" / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    unsound = reap_serve("verify", tmp_path / "out", "--source", source, "--json")
    assert unsound.returncode == 1
    document = json.loads(unsound.stdout)
    assert document["sound"] is False
    assert [set(finding) for finding in document["findings"]] == [{"severity", "check", "detail"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "plan.json", "out"), "model nowhere does not exist"),
        (("source", "nowhere.json", "out"), "nowhere.json does not exist"),
        (("source", "source", "out"), "cannot be read"),
        (("source", "source/LICENSE", "out"), "is not JSON"),
        (("source", "source/config.json", "out"), "is not a valid plan"),
        (("source", "plan.json", "source"), "exists already"),
        (("source", "plan.json", "out", "--mtp", "keep"), "--mtp is 'keep'"),
        (("source", "plan.json", "out", "--low-disk"), "--low-disk is given"),
        (("source", "plan.json", "out", "--jobs", "0"), "--jobs"),
        (("source", "plan.json"), "OUTPUT"),
    ],
)
def test_wrong_requests_give_one_line_and_exit_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "source")
    write_plan(tmp_path / "plan.json", KEPT)
    monkeypatch.chdir(tmp_path)
    done = reap_serve("prune", *arguments, "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "source"]


def test_experts_without_a_scale_are_named(tmp_path: Path) -> None:
    """Expert 3 of layer 1, which stays, lacks what the others have; expert 2, which goes, is not worth a word."""
    from small_checkpoint import layer_tensors, safetensors_bytes

    source = write_checkpoint(tmp_path / "source")
    tensors = {**layer_tensors(1), "lm_head.weight": ("BF16", [1, 2], b"head")}
    for expert in (0, 1):
        tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.input_scale"] = ("F32", [], bytes(4))
    (source / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(tensors))
    plan = write_plan(tmp_path / "plan.json", {0: [0, 1], 1: [1, 3]})
    done = reap_serve("prune", source, plan, tmp_path / "out")
    assert done.returncode == 0
    named = [line for line in done.stderr.splitlines() if "lacks" in line]
    assert named == [
        "warning: model.layers.1.mlp.experts.3 lacks up_proj.input_scale, which other experts of its layer have"
    ]
    unsound = reap_serve("verify", tmp_path / "out")
    assert unsound.returncode == 1
    assert "scales: model.layers.1.mlp.experts.1 lacks up_proj.input_scale" in unsound.stdout
