"""Pruning from a hub that is a directory beside: files come one at a time and none stays."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import huggingface_hub
import pytest
from small_checkpoint import read_all, read_back, safetensors_bytes, write_checkpoint, write_plan

from reap_serve.errors import ExecutionError, InputFileError, MismatchError, StorageError
from reap_serve.model import fingerprint, open_model
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.hub import HubRepository, push
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import Watcher, prune

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1)
KEPT = {0: [1, 3], 1: [0, 2]}


@dataclass
class FakeHub:
    """A repository that is a directory, and notes what was asked of it."""

    directory: Path
    rest: Path
    revision: str = "c0ffee"
    downloads: list[str] = field(default_factory=list)
    most_at_once: int = 0

    def weight_files(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in sorted(self.directory.glob("*.safetensors"))}

    def open(self, file: str) -> BinaryIO:
        return (self.directory / file).open("rb")

    def download(self, file: str, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        self.downloads.append(file)
        shutil.copy(self.directory / file, folder / file)
        self.most_at_once = max(self.most_at_once, len(list(folder.iterdir())))
        return folder / file

    def download_rest(self) -> Path:
        if not self.rest.exists():
            shutil.copytree(self.directory, self.rest, ignore=shutil.ignore_patterns("*.safetensors"))
        return self.rest


@pytest.fixture
def hub(tmp_path: Path) -> FakeHub:
    return FakeHub(write_checkpoint(tmp_path / "on-the-hub"), tmp_path / "here")


def bound_plan(path: Path, directory: Path) -> Path:
    plan = json.loads(write_plan(path, KEPT).read_text())
    plan["model"] = fingerprint(open_model(str(directory))).model_dump()
    path.write_text(json.dumps(plan))
    return path


def test_the_result_is_that_of_a_local_run(hub: FakeHub, tmp_path: Path) -> None:
    plan = bound_plan(tmp_path / "plan.json", hub.directory)
    prune(str(hub.directory), plan, tmp_path / "local", OPTIONS, overwrite=False)
    result = prune("org/name", plan, tmp_path / "remote", OPTIONS, overwrite=False, remote=hub)
    assert read_all(tmp_path / "remote") == read_all(tmp_path / "local")
    for name in ("reap_router.sidecar", "config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    manifest = json.loads((tmp_path / "remote" / "reap_manifest.json").read_text())
    assert manifest["source_fingerprint"] == fingerprint(open_model(str(hub.directory))).model_dump()
    assert manifest["source_revision"] == "c0ffee"
    local = json.loads((tmp_path / "local" / "reap_manifest.json").read_text())
    assert [manifest[key] for key in ("digests", "files", "config")] == [
        local[key] for key in ("digests", "files", "config")
    ]
    assert "reap_router.sidecar" in manifest["files"]
    assert result.bytes_read == 104
    assert hub.most_at_once == 1
    assert hub.downloads == sorted(hub.weight_files())
    assert not list(tmp_path.glob(".*"))


def test_a_file_of_dropped_experts_is_never_fetched(hub: FakeHub, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.{}.weight"
    moved = [name.format(projection) for projection in ("gate_proj", "up_proj", "down_proj")]
    second = hub.directory / "model-00002-of-00002.safetensors"
    tensors = read_back(second)
    third = {key: tensors.pop(key) for key in moved}
    second.write_bytes(safetensors_bytes(tensors))
    (hub.directory / "model-00003.safetensors").write_bytes(safetensors_bytes(third))
    path = hub.directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(dict.fromkeys(moved, "model-00003.safetensors"))
    path.write_text(json.dumps(index))
    plan = bound_plan(tmp_path / "plan.json", hub.directory)
    prune("org/name", plan, tmp_path / "out", OPTIONS, overwrite=False, remote=hub)
    assert "model-00003.safetensors" not in hub.downloads


def test_a_second_attempt_fetches_only_what_is_missing(hub: FakeHub, tmp_path: Path) -> None:
    plan = bound_plan(tmp_path / "plan.json", hub.directory)
    seen: list[int] = []

    def crash(num_bytes: int) -> None:
        seen.append(num_bytes)
        if sum(seen) > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune("org/name", plan, tmp_path / "out", OPTIONS, overwrite=False, remote=hub, watcher=Watcher(advance=crash))
    hub.downloads.clear()
    prune("org/name", plan, tmp_path / "out", OPTIONS, overwrite=False, remote=hub)
    assert hub.downloads == ["model-00002-of-00002.safetensors"]
    prune(str(hub.directory), plan, tmp_path / "local", OPTIONS, overwrite=False)
    assert read_all(tmp_path / "out") == read_all(tmp_path / "local")


def test_a_plan_for_other_weights_is_refused_at_the_latest_before_publication(hub: FakeHub, tmp_path: Path) -> None:
    plan = bound_plan(tmp_path / "plan.json", hub.directory)
    file = hub.directory / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(MismatchError, match="other weights"):
        prune("org/name", plan, tmp_path / "out", OPTIONS, overwrite=False, remote=hub)
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_after_its_header_was_read_is_noticed(hub: FakeHub, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.json", KEPT)
    file = hub.directory / "model-00002-of-00002.safetensors"

    def change(job: object) -> None:
        file.write_bytes(safetensors_bytes({"other": ("U8", [1], b"x")}))

    with pytest.raises(StorageError, match="not the file whose header"):
        prune("org/name", plan, tmp_path / "out", OPTIONS, overwrite=False, remote=hub, watcher=Watcher(started=change))


def test_the_repository_asks_the_hub_for_one_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, object]] = []
    files = [
        SimpleNamespace(rfilename="b.safetensors", size=7),
        SimpleNamespace(rfilename="a.safetensors", size=5),
        SimpleNamespace(rfilename="original/c.safetensors", size=9),
        SimpleNamespace(rfilename="config.json", size=2),
    ]

    def model_info(self: object, name: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        asked.append((name, revision))
        return SimpleNamespace(sha="abc", siblings=files)

    def hf_hub_download(name: str, file: str, *, revision: str, local_dir: Path) -> str:
        asked.append((file, revision))
        return str(local_dir / file)

    def snapshot_download(name: str, *, revision: str, ignore_patterns: list[str]) -> str:
        asked.append(("rest", revision))
        assert "*.safetensors" in ignore_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    repository = HubRepository("org/name@main")
    assert repository.weight_files() == {"a.safetensors": 5, "b.safetensors": 7}
    assert repository.download("a.safetensors", tmp_path) == tmp_path / "a.safetensors"
    assert repository.download_rest() == tmp_path
    assert asked == [("org/name", "main"), ("a.safetensors", "abc"), ("rest", "abc")]


def test_failures_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ExecutionError, match="no route to host;"):
        HubRepository("org/name")
    with pytest.raises(ExecutionError, match="was not uploaded"):
        push(tmp_path, "org/name")


def test_push_uploads_the_directory_to_a_private_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, object]] = []

    def create_repo(self: object, repository: str, **options: object) -> None:
        calls.append({"repository": repository, **options})

    def upload_folder(self: object, **options: object) -> str:
        calls.append(options)
        return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert push(tmp_path, "org/pruned") == "https://hub/commit"
    assert calls[0] == {"repository": "org/pruned", "private": True, "exist_ok": True}
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("org/pruned", tmp_path)


def test_an_index_that_names_a_file_which_the_repository_lacks(hub: FakeHub, tmp_path: Path) -> None:
    (hub.directory / "model-00002-of-00002.safetensors").unlink()
    plan = write_plan(tmp_path / "plan.json", KEPT)
    with pytest.raises(InputFileError, match="which the repository lacks"):
        prune("org/name", plan, tmp_path / "out", OPTIONS, overwrite=False, remote=hub)
