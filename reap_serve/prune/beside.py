"""Writes what stands beside the weights of an output: full routers, files that go along, rewritten configurations."""

from __future__ import annotations

from pathlib import Path

from reap_serve.prune.checkpoint import SIDECAR_NAME
from reap_serve.prune.digests import FileDigest, FileDigester
from reap_serve.prune.job import QUANT_CONFIG_NAMES, SIDECAR_METADATA, Job
from reap_serve.prune.layout import header_bytes
from reap_serve.prune.write import carry, write_tensors, write_text


def write_sidecar(job: Job, content: Path) -> FileDigest:
    """Writes the sidecar from the source's weight files.

    Returns:
        The digest of the file.
    """
    whole = FileDigester()
    header = header_bytes(job.sidecar, SIDECAR_METADATA)
    write_tensors(content / SIDECAR_NAME, header, job.sidecar, job.checkpoint, lambda num_bytes: None, whole=whole)
    return whole.found


def write_beside(job: Job, content: Path) -> dict[str, FileDigest]:
    """Copies what goes along and writes what is rewritten.

    Returns:
        The digest of each file but those that `verify` checks by their meaning: config.json and the index.
    """
    found = carry(job.source.path, content, job.companions.carried)
    for name, text in job.texts.items():
        write_text(content / name, text)
        if name in QUANT_CONFIG_NAMES:
            found[name] = FileDigest.of(text)
    return found
