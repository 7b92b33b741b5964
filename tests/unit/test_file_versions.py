"""Every kind of file carries a version: a later one is refused with both numbers, whatever else it holds."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reap_serve.compare.record import Report
from reap_serve.compare.subspace import Subspace, read_subspace
from reap_serve.cycle.state import DECISION_NAME, INPUTS_NAME, Decision, Inputs, State
from reap_serve.errors import InputFileError
from reap_serve.merge.record import MergeRecord
from reap_serve.plan.record import Plan, read_plan
from reap_serve.prune.manifest import MANIFEST_NAME, Manifest, read_manifest
from reap_serve.records import FileRecord, read_record
from reap_serve.serve.plan_files import named_plan_files
from reap_serve.statistics.record import Header
from reap_serve.tune.record import TuneReport

PACKAGE = Path(__file__).parents[2] / "reap_serve"
KINDS = (Plan, Manifest, Report, Subspace, MergeRecord, Header, TuneReport, Inputs, Decision)
# By the name of the file in a folder: what reads it. `test_file` has statistics, `test_shadow` the sidecar.
READERS: dict[str, Callable[[Path], object]] = {
    "plan.json": lambda folder: read_plan(folder / "plan.json"),
    "served.json": lambda folder: named_plan_files([f"candidate={folder / 'served.json'}"], None),
    "mask.json": lambda folder: named_plan_files([], folder / "mask.json"),
    MANIFEST_NAME: read_manifest,
    "subspace.json": lambda folder: read_subspace(folder / "subspace.json"),
    INPUTS_NAME: lambda folder: State(folder).inputs_of(folder),
    DECISION_NAME: lambda folder: State(folder).decision_of(folder),
}


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_file_refuses_a_later_version(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"schema_version": 7, "of another": "form"}))
    with pytest.raises(InputFileError, match=r"schema version 7, this release reads version 1"):
        READERS[name](tmp_path)


def test_every_record_with_a_version_checks_it() -> None:
    declaring = {
        (path.relative_to(PACKAGE).as_posix(), node.name)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == "schema_version"
    }
    assert declaring == {("records.py", "FileRecord")}
    ours = {kind for kind in FileRecord.__subclasses__() if kind.__module__.startswith("reap_serve.")}
    assert ours == set(KINDS)


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
