"""The check of a table of names against sources: what is not as the table says is named."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from reap_serve.adapter.releases import check
from reap_serve.adapter.releases.check import RELEASES, release_problems
from reap_serve.adapter.releases.names import ClassNames, Entry, FunctionNames, ModuleName, Release, TextName, ValueName
from reap_serve.adapter.releases.sources import MissingNameError, Sources

FILES = {
    "vllm/__init__.py": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from vllm.runner import Runner
""",
    "vllm/base.py": """
class Base:
    field: int
    def method(self, first, second=None, *, third): ...
    def overridden(self, old): ...
    def __init__(self):
        if True:
            self.late, self.pair = 1, 2
        self.read.something = 3
""",
    "vllm/runner.py": """
import torch
from . import base as parts
if TYPE_CHECKING:
    from elsewhere import Typed
else:
    Typed = object
try:
    from .base import Base as Alias
except ImportError:
    pass
LIMIT = 3
class Runner(parts.Base, torch.nn.Module):
    NONE = 0
    @property
    def made(self): ...
    def overridden(self, new): ...
class Second(Alias): ...
class Fields(Typed):
    key: int
def function(name, *, other): ...
register("operator_name")
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small vLLM."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_members_are_those_of_all_base_classes_and_of_self(folder: Path) -> None:
    members = Sources(folder).members("vllm", "Runner")
    assert members.attributes == {"field", "late", "pair", "NONE", "made"}
    assert members.methods["method"] == ("self", "first", "second", "third")
    assert members.methods["overridden"] == ("self", "new")
    assert "something" not in members, "that is set on another object"
    assert "late" in Sources(folder).members("vllm.runner", "Second")


@pytest.mark.parametrize(
    ("entry", "problems"),
    [
        (ClassNames("vllm", "Runner", ("field", "made"), {"method": ("self", "first")}), []),
        (ClassNames("vllm.runner", "Fields", ("key",)), []),
        (ClassNames("vllm.runner", "Runner", ("field", "_gone")), ["Runner has no _gone"]),
        (ClassNames("vllm.runner", "Runner", methods={"_run": ("self",)}), ["Runner has no _run"]),
        (
            ClassNames("vllm.runner", "Runner", methods={"method": ("self", "second")}),
            ["Runner.method takes ('self', 'first', 'second', 'third'), expected ('self', 'second')"],
        ),
        (ClassNames("vllm.runner", "Third"), ["vllm.runner has no Third"]),
        (ClassNames("vllm.nowhere", "Third"), ["there is no module vllm.nowhere"]),
        (FunctionNames("vllm.runner", "function", ("name", "other")), []),
        (
            FunctionNames("vllm.runner", "function", ("other",)),
            ["function takes ('name', 'other'), expected ('other',)"],
        ),
        (FunctionNames("vllm.runner", "LIMIT"), ["vllm.runner.LIMIT is no function"]),
        (ClassNames("vllm.runner", "LIMIT"), ["vllm.runner.LIMIT is no class"]),
        (ValueName("vllm.runner", "LIMIT"), []),
        (ValueName("vllm.runner", "LEAST"), ["vllm.runner has no LEAST"]),
        (TextName("vllm.runner", "operator_name"), []),
        (ModuleName("vllm.runner"), []),
        (ModuleName("vllm.runners"), ["there is no module vllm.runners"]),
        (TextName("vllm.runner", "operator"), ['vllm.runner does not name "operator"']),
    ],
)
def test_what_is_not_as_the_table_says_is_named(folder: Path, entry: Entry, problems: list[str]) -> None:
    assert release_problems(Release("0.0", (entry,)), folder) == problems


def test_names_are_not_looked_for_in_circles(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("from vllm.one import Thing")
    (tmp_path / "vllm" / "one.py").write_text("from vllm import Thing")
    with pytest.raises(MissingNameError, match="has no Thing"):
        Sources(tmp_path).find("vllm", "Thing")


def test_the_check_leaves_the_collector_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(check, "vllm_folder", lambda: folder)
    found = []
    monkeypatch.setattr(check, "release_problems", lambda release, folder: [str(gc.isenabled())])
    try:
        for switch in (gc.disable, gc.enable):
            switch()
            check.installed_problems.cache_clear()
            found.append((*check.installed_problems(), gc.isenabled()))
    finally:
        gc.enable()
        check.installed_problems.cache_clear()
    assert found == [("False", False), ("False", True)]


def test_every_entry_of_a_table_is_looked_at(folder: Path) -> None:
    """In a vLLM that has none of its modules, each entry is a problem."""
    table = RELEASES["0.32"]
    found = release_problems(table, folder)
    assert len(found) == len(table.names)
    assert all(entry.module in problem for entry, problem in zip(table.names, found, strict=True))
