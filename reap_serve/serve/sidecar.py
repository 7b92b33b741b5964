"""What pruning left beside a pruned checkpoint of the routers that it had: their full tensors, and who was kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.errors import InputFileError
from reap_serve.prune.checkpoint import SIDECAR_VERSION, SIDECARS
from reap_serve.prune.manifest import MANIFEST_NAME, read_manifest
from reap_serve.records import read_json_object, version_problem


@dataclass(frozen=True, slots=True)
class FullRouter:
    """One layer's router before pruning.

    Attributes:
        weight_EH: Its matrix, one row an expert.
        vectors_E: Further tensors with one entry an expert: a bias of the matrix, a correction bias.
        kept: The checkpoint's experts by their ids before pruning, ascending.
    """

    weight_EH: torch.Tensor
    vectors_E: tuple[torch.Tensor, ...]
    kept: tuple[int, ...]


def read_sidecar(directory: Path) -> dict[int, FullRouter] | None:
    """The full routers of a pruned checkpoint by index of the decoder layer; None when it has no sidecar.

    Raises:
        InputFileError: One of both is of a later version, or sidecar and manifest do not fit together.
    """
    from safetensors import safe_open

    path = next((path for name in SIDECARS if (path := directory / name).exists()), None)
    if path is None:
        return None
    config = read_json_object(directory / "config.json")
    architecture = resolve(config)
    names = TensorNames(architecture, architecture.num_layers(config))
    kept = {layer.index: layer.old_ids for layer in read_manifest(directory).layers}
    weights: dict[int, torch.Tensor] = {}
    vectors: dict[int, list[torch.Tensor]] = {}
    with safe_open(str(path), "pt") as file:
        _require_known_version(file.metadata(), path)
        for name in file.keys():  # noqa: SIM118 - no mapping
            role = names.role(name)
            if role.layer is None or role.is_mtp:
                continue
            if role.kind is Kind.ROUTER:
                weights[role.layer] = file.get_tensor(name)
            elif role.kind is Kind.ROUTER_PART and not role.suffix.endswith(".bias"):
                raise InputFileError(
                    f"{path}: the routers are quantised ({name})", "observe a model with routers in bfloat16"
                )
            elif role.kind in (Kind.SLICED, Kind.ROUTER_PART):
                vectors.setdefault(role.layer, []).append(file.get_tensor(name))
    missing = sorted(set(weights) - set(kept))
    if missing or not weights:
        raise InputFileError(f"{path} and {MANIFEST_NAME} name different layers", "prune the model again")
    return {layer: FullRouter(weight, tuple(vectors.get(layer, ())), kept[layer]) for layer, weight in weights.items()}


def _require_known_version(metadata: Mapping[str, str] | None, path: Path) -> None:
    # The first sidecars carried no version; they are of the first.
    stated = (metadata or {}).get("schema_version", "1")
    problem = version_problem(int(stated) if re.fullmatch("[0-9]{1,9}", stated) else stated, SIDECAR_VERSION)
    if problem is not None:
        raise InputFileError(f"{path}: {problem}", "use the release of reap-serve that wrote it")
