"""`reap_manifest.json`: what was pruned, from what, by which plan; enough to prove the output or to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import model_validator

from reap_serve.model import Fingerprint
from reap_serve.overwriting import MANIFEST
from reap_serve.plan.record import Plan
from reap_serve.prune.digests import FileDigest
from reap_serve.records import FileRecord, Provenance, Record, read_record, strict_json

MANIFEST_NAME = MANIFEST
SCHEMA_VERSION = 1


class ManifestLayer(Record):
    """One layer with routed experts.

    Attributes:
        index: Index of the decoder layer; from the trunk's number of layers on it is a multi-token-prediction layer.
        old_ids: The source's expert at each new id.
    """

    index: int
    old_ids: tuple[int, ...]


class ParameterCount(Record):
    """Parameters of a model: all, and those active per token."""

    total: int
    active: int


class Manifest(FileRecord):
    """A pruned checkpoint's origin.

    Attributes:
        source: What the user named as the model.
        source_revision: Commit on the hub, None for a local directory.
        source_fingerprint: Fingerprint of the source.
        plan: The plan, with the provenance of its statistics.
        plan_sha256: Of the plan's file.
        mtp: `cut` or `drop`, None when the checkpoint has no multi-token-prediction layers.
        experts_before: Experts per layer of the source.
        experts_after: Experts per layer here; the largest count where layers differ.
        layers: Old ids by new ids of every layer here, draft layers too, of which no plan speaks; so who follows
            experts through the cut reads no plan. A manifest whose plan keeps others is refused.
        tensors: Number of tensors by what became of them.
        parameters_before: Of the source.
        parameters_after: Of the output.
        weight_files: Size of each weight file, bytes.
        digests: Digest of each tensor of the output, XXH3 of 64 bits in hexadecimal; None in outputs of 0.1.
        files: Size and digest of each file beside the weights, by its path below the output; None in older outputs.
            Not of what is checked by its meaning (config.json, the index), nor of the model card, which is the user's.
        config: Each value of the output's config.json, as `compare_config.config_values` gives them; None in older
            outputs.
        provenance: What made it.
    """

    source: str
    source_revision: str | None
    source_fingerprint: Fingerprint
    plan: Plan
    plan_sha256: str
    mtp: str | None
    experts_before: int
    experts_after: int
    layers: tuple[ManifestLayer, ...]
    tensors: Mapping[str, int]
    parameters_before: ParameterCount
    parameters_after: ParameterCount
    weight_files: Mapping[str, int]
    digests: Mapping[str, str] | None = None
    files: Mapping[str, FileDigest] | None = None
    config: Mapping[str, str] | None = None
    provenance: Provenance

    @model_validator(mode="after")
    def _require_one_cut(self) -> Self:
        old_ids = {layer.index: layer.old_ids for layer in self.layers}
        for index, kept in self.plan.kept_by_layer.items():
            if old_ids.get(index) != kept:
                raise ValueError(f"layer {index} does not hold the experts that the plan keeps")
        return self

    def with_weights(self, weights_sha256: str) -> Manifest:
        """The same with the source's digest, where that was known only after the last byte."""
        known = self.source_fingerprint.model_copy(update={"weights_sha256": weights_sha256})
        return self.model_copy(update={"source_fingerprint": known})

    def with_digests(self, tensors: Mapping[str, str], files: Mapping[str, FileDigest]) -> Manifest:
        """The same with the digests of tensors and files, which are known after the last byte."""
        return self.model_copy(update={"digests": tensors, "files": files})

    def to_bytes(self) -> bytes:
        """The file's content."""
        return strict_json(self.model_dump(mode="json"), indent=1)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a pruned checkpoint.

    Raises:
        InputFileError: It is missing or not a manifest.
    """
    return read_record(directory / MANIFEST_NAME, Manifest, "manifest")
