"""A whole pruning on a checkpoint small enough to check by hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from small_checkpoint import (
    CONFIG,
    expert_bytes,
    layer_tensors,
    read_all,
    read_back,
    safetensors_bytes,
    write_checkpoint,
    write_plan,
)

from reap_serve.errors import (
    ExecutionError,
    InputFileError,
    OutputExistsError,
    StorageError,
)
from reap_serve.prune import run
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.manifest import read_manifest
from reap_serve.prune.run import Watcher, prune
from reap_serve.prune.staging import staging_directory

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 2)
KEPT = {0: [1, 3], 1: [0, 2]}


def file_names(directory: Path) -> set[str]:
    """Every file below a directory."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory but for the manifest's time."""
    found = {name: (directory / name).read_bytes() for name in file_names(directory)}
    if "reap_manifest.json" in found:
        manifest = json.loads(found["reap_manifest.json"])
        manifest["provenance"].pop("created")
        found["reap_manifest.json"] = json.dumps(manifest).encode()
    return found


def test_kept_experts_are_renumbered_and_every_byte_is_theirs(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    before = snapshot(source)
    result = prune(str(source), write_plan(tmp_path / "plan.json", KEPT), tmp_path / "out", OPTIONS, overwrite=False)
    tensors = read_all(tmp_path / "out")
    for layer, kept in KEPT.items():
        for new, old in enumerate(kept):
            for index, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
                name = f"model.layers.{layer}.mlp.experts.{new}.{projection}.weight"
                assert tensors[name] == ("U8", [2, 3], expert_bytes(layer, old, index))
        rows = b"".join(bytes([old] * 4) for old in kept)
        assert tensors[f"model.layers.{layer}.mlp.gate.weight"] == ("BF16", [2, 2], rows)
    # 2 layers of (norm + router + 2 experts of 3), embedding and head
    assert len(tensors) == result.tensors == 2 * (2 + 6) + 2
    assert (result.experts_before, result.experts_after) == (4, 2)
    data_bytes = 2 * (4 + 8 + 6 * 6) + 8
    assert result.bytes_read == data_bytes
    files = (tmp_path / "out").glob("model*.safetensors")
    assert result.bytes_written == sum(path.stat().st_size for path in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    # a BF16 element has two bytes, a U8 one: 4 + 4 + 2 * (2 + 4 + 36) elements
    assert index["metadata"] == {"total_size": data_bytes, "total_parameters": 2 + 2 + 2 * (2 + 4 + 36), "author": "a"}
    assert set(index["weight_map"]) == set(tensors)
    assert snapshot(source) == before


def test_what_goes_along(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "own").mkdir()
    (source / "own" / "layers.py").write_text("x = 1")
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    prune(str(source), write_plan(tmp_path / "plan.json", KEPT), tmp_path / "out", OPTIONS, overwrite=False)
    assert file_names(tmp_path / "out") == {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_own.py",
        "own/layers.py",
        "reap_manifest.json",
        "reap_router.sidecar",
        "tokenizer.json",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**CONFIG, "num_experts": 2}
    manifest = read_manifest(tmp_path / "out")
    assert {layer.index: list(layer.old_ids) for layer in manifest.layers} == KEPT
    assert (
        manifest.tensors == {"keep": 4 + 2 + 3 + 0, "rename": 9, "slice": 2, "drop": 12}
        or sum(manifest.tensors.values()) == 30
    )


def test_the_sidecar_holds_the_full_routers(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    prune(str(source), write_plan(tmp_path / "plan.json", KEPT), tmp_path / "out", OPTIONS, overwrite=False)
    rows = b"".join(bytes([expert] * 4) for expert in range(4))
    assert read_back(tmp_path / "out" / "reap_router.sidecar") == {
        f"model.layers.{layer}.mlp.gate.weight": ("BF16", [4, 2], rows) for layer in (0, 1)
    }


def test_an_identity_plan_reproduces_every_tensor(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    everything = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    prune(str(source), write_plan(tmp_path / "plan.json", everything), tmp_path / "out", OPTIONS, overwrite=False)
    assert read_all(tmp_path / "out") == read_all(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize(("shard_bytes", "num_files"), [(1, 18), (20, 6), (60, 2), (1 << 30, 2)])
def test_the_size_of_shards_changes_no_tensor(shard_bytes: int, num_files: int, tmp_path: Path) -> None:
    """20 bytes: 4+4+8, 6+6+6, 6+6+6 of the first file; 4+8+6, 6+6+6, 6+6+4 of the second."""
    source = write_checkpoint(tmp_path / "source")
    plan = write_plan(tmp_path / "plan.json", KEPT)
    prune(str(source), plan, tmp_path / "whole", OPTIONS, overwrite=False)
    prune(str(source), plan, tmp_path / "cut", PruneOptions(MtpChoice.CUT, shard_bytes, 3), overwrite=False)
    assert read_all(tmp_path / "cut") == read_all(tmp_path / "whole")
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) == num_files


def test_a_single_file_gets_an_index_so_that_no_loader_reads_the_sidecar(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    for path in source.glob("model*"):
        path.unlink()
    (source / "model.safetensors").write_bytes(safetensors_bytes({**layer_tensors(0), **layer_tensors(1)}))
    prune(str(source), write_plan(tmp_path / "plan.json", KEPT), tmp_path / "out", OPTIONS, overwrite=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}


class CrashError(Exception):
    """Stands for a crash."""


def test_a_second_attempt_goes_on_where_the_first_was_stopped(tmp_path: Path) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    one_at_a_time = PruneOptions(MtpChoice.CUT, 60, 1)
    prune(str(source), plan, tmp_path / "undisturbed", one_at_a_time, overwrite=False)
    steps: list[int] = []

    def crash(num_bytes: int) -> None:
        steps.append(num_bytes)
        if sum(steps) > 60:
            raise CrashError

    with pytest.raises(CrashError):
        prune(str(source), plan, tmp_path / "out", one_at_a_time, overwrite=False, watcher=Watcher(advance=crash))
    assert not (tmp_path / "out").exists()
    result = prune(str(source), plan, tmp_path / "out", one_at_a_time, overwrite=False)
    assert 0 < result.bytes_read < 104
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_plan_does_not_take_over_what_an_attempt_left(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    options = PruneOptions(MtpChoice.CUT, 60, 1)
    first, second = write_plan(tmp_path / "1.json", KEPT), write_plan(tmp_path / "2.json", {0: [0, 2], 1: [1, 3]})
    seen: list[int] = []

    def crash(num_bytes: int) -> None:
        seen.append(num_bytes)
        if sum(seen) > 60:
            raise CrashError

    with pytest.raises(CrashError):
        prune(str(source), first, tmp_path / "out", options, overwrite=False, watcher=Watcher(advance=crash))
    result = prune(str(source), second, tmp_path / "out", options, overwrite=False)
    assert result.bytes_read == 104
    prune(str(source), second, tmp_path / "undisturbed", options, overwrite=False)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)

    def touch(job: object) -> None:
        os.utime(source / "model-00002-of-00002.safetensors", ns=(1, 1))

    with pytest.raises(StorageError, match="changed while it was read"):
        prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False, watcher=Watcher(started=touch))
    assert not (tmp_path / "out").exists()


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    file = source / "model-00002-of-00002.safetensors"
    state = file.stat()

    def shrink(job: object) -> None:
        os.truncate(file, state.st_size - 4)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))

    with pytest.raises(StorageError, match=r"changed|ended"):
        prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False, watcher=Watcher(started=shrink))


def test_a_full_disk_is_noticed_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="are free beside it"):
        prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "source"]


def test_overwrite_replaces_and_without_it_nothing_is_touched(tmp_path: Path) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        prune(str(source), plan, out, OPTIONS, overwrite=False)
    assert [path.name for path in out.iterdir()] == ["mine"]
    with pytest.raises(OutputExistsError, match="nothing that tells it was made by reap-serve"):
        prune(str(source), plan, out, OPTIONS, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    for _ in range(2):
        prune(str(source), plan, out, OPTIONS, overwrite=True)
    assert (out / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json", "source"]


@pytest.mark.parametrize("place", ["source", "source/out", "."])
def test_the_source_is_never_the_output(place: str, tmp_path: Path) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    before = snapshot(source)
    with pytest.raises(InputFileError, match="overlaps"):
        prune(str(source), plan, tmp_path / place, OPTIONS, overwrite=True)
    assert snapshot(source) == before


def test_two_processes_do_not_share_an_output(tmp_path: Path) -> None:
    source, plan = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    with (
        staging_directory(tmp_path / "out", "other"),
        pytest.raises(ExecutionError, match="another process"),
    ):
        prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False)
