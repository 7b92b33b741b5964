"""A checkpoint directory: which of its files hold weights, what their headers say, and what else it carries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reap_serve.errors import InputFileError
from reap_serve.records import JsonValue, read_json_object
from reap_serve.weight_headers import Shard, Tensor, check_tensor_name, read_shard

INDEX_NAME = "model.safetensors.index.json"
# The full routers beside a pruned checkpoint: a safetensors file by another name, because loaders that read every
# `*.safetensors`, as vLLM's `runai_streamer` does, would load them over the cut ones. The old name is that of 0.1.
SIDECAR_NAME = "reap_router.sidecar"
OLD_SIDECAR_NAME = "reap_router.safetensors"
SIDECARS = (SIDECAR_NAME, OLD_SIDECAR_NAME)
SIDECAR_VERSION = 1
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".sidecar")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The headers of a checkpoint.

    Attributes:
        directory: Where its files stand.
        shards: Weight files by name.
        tensors: Every tensor by name, in the order of files and offsets.
        index_metadata: Free entries of the index, without `total_size`; empty without an index.
    """

    directory: Path
    shards: Mapping[str, Shard]
    tensors: Mapping[str, Tensor]
    index_metadata: Mapping[str, JsonValue]


class WeightFiles(Protocol):
    """The weight files beside a configuration, wherever they are."""

    def names(self) -> list[str]:
        """Names of the .safetensors files at the top, ascending."""

    def shard(self, name: str) -> Shard:
        """The header of one, checked."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The weight files in a directory.

    Attributes:
        directory: Where they stand.
    """

    directory: Path

    def names(self) -> list[str]:
        """Names of the .safetensors files at the top, ascending."""
        return sorted(path.name for path in self.directory.glob("*.safetensors"))

    def shard(self, name: str) -> Shard:
        """The header of one, checked."""
        require_inside(self.directory, self.directory / name)
        return read_shard(self.directory / name)


def read_checkpoint(directory: Path, files: WeightFiles | None = None) -> Checkpoint:
    """Reads the headers of every weight file that a loader would read.

    Args:
        directory: Where configuration and index stand.
        files: The weight files, None when they stand there too.

    Raises:
        InputFileError: A file is missing or corrupt, lies outside the directory, or a tensor is missing or there twice.
    """
    files = files or LocalFiles(directory)
    index_path = directory / INDEX_NAME
    weight_map: dict[str, str] | None = None
    metadata: Mapping[str, JsonValue] = {}
    if os.path.lexists(index_path):
        require_inside(directory, index_path)
        weight_map, metadata = _read_index(index_path)
    names = sorted(set(weight_map.values())) if weight_map is not None else _unindexed(files, directory)
    if weight_map is not None and isinstance(files, LocalFiles):
        _require_present(names, files.names(), directory)
    shards: dict[str, Shard] = {}
    tensors: dict[str, Tensor] = {}
    for name in names:
        shards[name] = files.shard(name)
        for tensor in shards[name].tensors:
            if tensor.name in tensors:
                raise InputFileError(
                    f"{tensor.name} stands in both {tensors[tensor.name].file} and {name}", "remove one of them"
                )
            tensors[tensor.name] = tensor
    for tensor_name, file in (weight_map or {}).items():
        if tensor_name not in tensors or tensors[tensor_name].file != file:
            raise InputFileError(f"{INDEX_NAME} puts {tensor_name} in {file}, which lacks it", "download it again")
    if not tensors:
        raise InputFileError(f"{directory} holds no tensor", "give a complete checkpoint")
    return Checkpoint(directory, shards, tensors, metadata)


def _read_index(path: Path) -> tuple[dict[str, str], Mapping[str, JsonValue]]:
    document = read_json_object(path)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputFileError(f"{path} has no weight_map", "download it again")
    checked: dict[str, str] = {}
    for tensor_name, file in weight_map.items():
        check_tensor_name(path.name, tensor_name)
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise InputFileError(f"{path.name} names the file {str(file)[:80]!r}", "only .safetensors beside it count")
        checked[tensor_name] = file
    metadata = document.get("metadata")
    kept = (
        {key: value for key, value in metadata.items() if key != "total_size"} if isinstance(metadata, Mapping) else {}
    )
    return checked, kept


def is_plain_name(name: str) -> bool:
    """Whether a text names a file in a directory and cannot lead out of it."""
    return bool(name) and name.isprintable() and not any(part in name for part in ("/", "\\", "..")) and name[0] != "."


def _require_present(named: list[str], present: list[str], directory: Path) -> None:
    """Refuses an index whose files are not there, with the remedy that fits what is there instead."""
    missing = [name for name in named if name not in present and not os.path.lexists(directory / name)]
    if not missing:
        return
    others = [name for name in present if name not in named]
    what = f"{INDEX_NAME} names {missing[0]}, which does not exist ({len(missing)} of {len(named)} files are missing)"
    if others and len(missing) == len(named):
        shown = ", ".join(others[:3])
        raise InputFileError(
            f"{what}; {shown} is there instead: the index is stale",
            f"delete {INDEX_NAME} if {shown} is the whole model",
        )
    raise InputFileError(what, "download the missing files")


def _unindexed(files: WeightFiles, directory: Path) -> list[str]:
    """The files that transformers and vLLM read without an index."""
    names = files.names()
    if "model.safetensors" in names:
        return ["model.safetensors"]
    found = [name for name in names if not name.startswith(("consolidated", "adapter_")) and name not in SIDECARS]
    if found:
        return found
    if any(name.startswith("consolidated") for name in names):
        raise InputFileError(
            f"{directory} holds only consolidated*.safetensors files, whose tensors have names of their own",
            "give the model with model*.safetensors files, in Hugging Face layout",
        )
    others = sorted(path.name for path in directory.iterdir() if path.name.endswith(WEIGHT_SUFFIXES))
    if others:
        raise InputFileError(
            f"{directory} holds no .safetensors file, only {others[0]}", "convert the weights to safetensors"
        )
    raise InputFileError(f"{directory} holds no weight file, only small files", "download its .safetensors files, too")


def require_inside(directory: Path, path: Path) -> None:
    """Refuses a file that a symbolic link leads out of the checkpoint, except into the blobs of the hub's cache.

    Raises:
        InputFileError: The file is missing or no regular file, or its target lies elsewhere.
    """
    try:
        target, home = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputFileError(f"{path} does not exist or its link leads nowhere", "download it again") from None
    if not target.is_file():
        raise InputFileError(f"{path} is not a regular file", "download it again")
    cached = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    if not target.is_relative_to(home) and not cached:
        raise InputFileError(
            f"{path} is a link out of the checkpoint, to {target}", "copy the file into the checkpoint"
        )
