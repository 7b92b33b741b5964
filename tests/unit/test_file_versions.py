"""Every kind of file carries a version: a later one is refused with both numbers, whatever else it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap_serve.compare.record import Report
from reap_serve.compare.subspace import Subspace
from reap_serve.errors import InputFileError
from reap_serve.merge.record import MergeRecord
from reap_serve.plan.record import Plan
from reap_serve.prune.manifest import Manifest
from reap_serve.records import FileRecord, read_record
from reap_serve.statistics.record import Header

KINDS = (Plan, Manifest, Report, Subspace, MergeRecord, Header)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_later_version_is_refused_with_both_numbers(kind: type[FileRecord], tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"schema_version": 7, "of another": "form"}))
    with pytest.raises(
        InputFileError, match=f"schema version 7, this release reads version {kind.newest_version}"
    ) as error:
        read_record(path, kind, "file")
    assert "other" not in str(error.value)


@pytest.mark.parametrize("version", [0, -1, "1", True, 1.5])
def test_what_is_no_version_is_refused(version: object, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"schema_version": version}))
    with pytest.raises(InputFileError, match="is no schema version"):
        read_record(path, Plan, "plan")


def test_a_file_without_a_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"criterion": "reap"}))
    with pytest.raises(InputFileError, match="schema_version"):
        read_record(path, Plan, "plan")
