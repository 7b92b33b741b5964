"""`reap_merge.json`: which experts of the source became which of a merged checkpoint."""

from __future__ import annotations

from reap_serve.model import Fingerprint
from reap_serve.records import FileRecord, Provenance, Record

MERGE_NAME = "reap_merge.json"
SCHEMA_VERSION = 1


class MergedExpert(Record):
    """One expert of the output.

    Attributes:
        dominant: The source's expert whose id order and router row it has.
        members: The source's experts that were averaged, ascending.
        weights: Of each member in the average.
    """

    dominant: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


class MergedLayer(Record):
    """One layer: its experts in the order of their new ids."""

    index: int
    experts: tuple[MergedExpert, ...]


class MergeRecord(FileRecord):
    """How a checkpoint was merged.

    Attributes:
        method: Name in `grouping.METHODS`.
        aligned: Whether hidden units were permuted before averaging.
        router: What became of the router.
        source_fingerprint: Of the source.
        statistics: Windows of the statistics that chose the groups.
        layers: Ascending by index.
        provenance: What made it.
    """

    method: str
    aligned: bool
    router: str
    source_fingerprint: Fingerprint
    statistics: tuple[str, ...]
    layers: tuple[MergedLayer, ...]
    provenance: Provenance
