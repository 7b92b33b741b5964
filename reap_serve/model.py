"""Opens MODEL (a directory or a hub id) and says which model it is: the fingerprint that every file carries."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from reap_serve.architectures.resolve import resolve
from reap_serve.errors import ExecutionError, InputFileError, MismatchError
from reap_serve.records import JsonValue, Record, read_json_object

CONFIG_KEYS_WITHOUT_MEANING = frozenset({"_name_or_path", "transformers_version", "use_cache"})
SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}(?:@[\w.\-/]+)?", re.ASCII)


class Fingerprint(Record):
    """Which model a file speaks of.

    Attributes:
        architecture: `model_type` of the (text) configuration.
        num_layers: Layers with routed experts.
        num_experts: Routed experts per layer.
        top_k: Experts chosen per token.
        dtype: Dtype that the configuration names, if it names one.
        quantization: Quantisation method of the checkpoint, None when unquantised.
        config_sha256: Of config.json as canonical JSON, without keys that carry no meaning for the weights.
        weights_sha256: Of the name, size, safetensors header and 64 evenly spaced 4 KiB samples of each weight file:
            tells fine-tunes of one architecture apart without reading a terabyte.
    """

    architecture: str
    num_layers: int
    num_experts: int
    top_k: int
    dtype: str | None
    quantization: str | None
    config_sha256: str
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's files on disk.

    Attributes:
        reference: What the user wrote.
        path: The directory that holds the files.
        revision: Commit on the hub, None for a local directory.
        config: config.json.
    """

    reference: str
    path: Path
    revision: str | None
    config: Mapping[str, JsonValue]


def require_path(reference: str) -> None:
    """Refuses a reference that can only be a path, of a place where nothing is.

    Raises:
        InputFileError: It is such a one.
    """
    if not HUB_ID.fullmatch(reference) and not Path(reference).exists():
        raise InputFileError(f"model {reference} does not exist", "give a local directory or a hub id org/name")


def open_model(reference: str) -> ModelSource:
    """Opens a local directory or a hub id (`org/name[@revision]`).

    Raises:
        InputFileError: No such model, or its config.json cannot be read.
        ExecutionError: The hub could not be reached.
    """
    path = Path(reference)
    revision = None
    require_path(reference)
    if not path.exists():
        path, revision = _download(reference)
    if not path.is_dir():
        raise InputFileError(f"model {reference} is not a directory", "give the folder that holds config.json")
    config = path / "config.json"
    if config.exists() and not config.is_file():
        raise InputFileError(f"{config} is not a regular file", "give the folder that holds config.json")
    return ModelSource(reference, path, revision, read_json_object(config))


def _download(reference: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name, _, revision = reference.partition("@")
    try:
        path = Path(snapshot_download(name, revision=revision or None))
    except (RepositoryNotFoundError, HFValidationError):
        raise InputFileError(f"model {name} is neither a directory nor on the hub", "check the name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ExecutionError(
            f"model {name} could not be downloaded: {str(error).splitlines()[0]}",
            "check the network or give a directory",
        ) from None
    return path, path.name


def fingerprint(source: ModelSource, weights_sha256: str | None = None) -> Fingerprint:
    """The fingerprint of a model on disk; reads the headers and 256 KiB of each weight file.

    Args:
        source: The model.
        weights_sha256: The weights' part, where it is known and the files are not all on this disk.

    Raises:
        ArchitectureError: The family is unknown, or the model has no routed experts.
        InputFileError: There is no weight file.
    """
    architecture = resolve(source.config)
    limits = architecture.limits(source.config)
    meaningful = {key: value for key, value in source.config.items() if key not in CONFIG_KEYS_WITHOUT_MEANING}
    canonical = json.dumps(meaningful, sort_keys=True, separators=(",", ":")).encode()
    quantization = source.config.get("quantization_config")
    text = architecture.text_config(source.config)
    dtype = text.get("dtype") or text.get("torch_dtype") or source.config.get("dtype")
    return Fingerprint(
        architecture=architecture.model_type,
        num_layers=len(limits.moe_layers),
        num_experts=limits.num_experts,
        top_k=limits.top_k,
        dtype=str(dtype) if dtype else None,
        quantization=str(quantization.get("quant_method")) if isinstance(quantization, Mapping) else None,
        config_sha256=hashlib.sha256(canonical).hexdigest(),
        weights_sha256=_weights_digest(source.path) if weights_sha256 is None else weights_sha256,
    )


def require_whole_weights(source: ModelSource) -> None:
    """Refuses a model whose weight files are truncated or corrupt, before an engine is started on them.

    The library by which engines open them judges, and not `weight_headers`, which refuses more than engines do.

    Raises:
        InputFileError: A file's header does not describe the file, or the path is one that no engine opens.
    """
    from safetensors import SafetensorError, safe_open

    require_utf8_path(source.path)
    for file in sorted(source.path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputFileError(f"{file} is truncated or corrupt: {error}", "download it again") from None


def require_utf8_path(path: Path) -> None:
    """Refuses a model's path that is no text: what only copies bytes opens it, tokenizers and vLLM do not.

    Raises:
        InputFileError: The path is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputFileError(
            f"model {path}: vLLM and tokenizers open no path that is not UTF-8", "rename the folder, or link to it"
        ) from None


def _weights_digest(path: Path) -> str:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputFileError(f"{path} holds no .safetensors file", "convert the weights to safetensors")
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise InputFileError(f"{file} is not a file or its link leads nowhere", "download it again")
        try:
            with file.open("rb") as handle:
                digest.update(weight_samples(handle, file.name, os.fstat(handle.fileno()).st_size))
        except OSError as error:
            raise InputFileError(f"{file} cannot be read: {error.strerror}", "check the disk") from None
    return digest.hexdigest()


def weight_samples(handle: BinaryIO, name: str, size: int) -> bytes:
    """What `weights_sha256` hashes of one weight file; the files follow each other in the order of their names."""
    samples = [f"{name} {size}\n".encode()]
    stride = max(size // SAMPLES_PER_FILE, SAMPLE_BYTES)
    for offset in range(0, size, stride):
        handle.seek(offset)
        samples.append(handle.read(SAMPLE_BYTES))
    return b"".join(samples)


def require_same_model(wanted: Fingerprint, found: Fingerprint, wanted_name: str, found_name: str) -> None:
    """Refuses two inputs that speak of different models.

    Raises:
        MismatchError: Names the first field that differs and both values.
    """
    for field in Fingerprint.model_fields:
        left, right = getattr(wanted, field), getattr(found, field)
        if left != right:
            raise MismatchError(
                f"{wanted_name} and {found_name} belong to different models: {field} is {left} against {right}",
                "use files that were made from the same checkpoint",
            )
