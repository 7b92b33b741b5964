"""The shape of the package: data flows one way, one package knows vLLM, and what needs no engine imports none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reap_serve.adapter.releases.check import RELEASES
from reap_serve.adapter.releases.names import ClassNames

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "reap_serve"

# Each stage may import the stages before it, the base modules and `architectures`, and nothing behind it.
STAGES = (
    "traffic",
    "statistics",
    "record",
    "adapter",
    "plan",
    "prune",
    "merge",
    "serve",
    "compare",
    "tune",
    "monitor",
    "cycle",
    "demo",
    "cli",
)
# Files that know of a later stage, and why.
EXCEPTIONS = {
    # The root of an engine process: vLLM calls it, and it wires recorders, masks and the shadow router.
    ("adapter/plugin.py", "serve"),
}
BASE = {
    "architectures",
    "engine_environment",
    "errors",
    "file_kinds",
    "leftovers",
    "model",
    "overwriting",
    "publish",
    "records",
    "shown_text",
    "slice_name",
    "weight_headers",
}


def imports_of(path: Path) -> set[str]:
    """First parts below `reap_serve` of all that a module imports, at its head and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "reap_serve":
                names = [f"reap_serve.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("reap_serve.")}
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_later_one(stage: str) -> None:
    later = set(STAGES[STAGES.index(stage) + 1 :])
    wrong = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in (PACKAGE / stage).rglob("*.py")
        for name in imports_of(path) & later
    }
    assert wrong == {each for each in EXCEPTIONS if each[0].startswith(f"{stage}/")}


def test_base_modules_import_no_stage() -> None:
    modules = {
        path.stem: imports_of(path) for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")
    }
    assert set(modules) | {"architectures"} == BASE
    assert {name: found for name, found in modules.items() if found & set(STAGES)} == {}


def test_every_package_is_a_stage() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages - {"architectures"} == set(STAGES)


# The reference implementation's files are torch's own; who exchanges none needs no torch.
EXCHANGE = {"statistics/foreign.py", "statistics/observer_state.py"}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
OUTSIDE = [name for name in FILES if not name.startswith("adapter/")]


# A module is one idea; a longer one holds two. So it is with tests and benches.
MAX_LINES = 300


@pytest.mark.parametrize("folder", ["reap_serve", "tests", "bench"])
def test_no_module_is_long(folder: str) -> None:
    paths = sorted((REPOSITORY / folder).rglob("*.py"))
    assert paths
    lines = {path.relative_to(REPOSITORY).as_posix(): len(path.read_text().splitlines()) for path in paths}
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}


def third_parties_of(path: Path) -> set[str]:
    """Top packages of all that a module imports, for types and inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def strings_of(path: Path) -> set[str]:
    """String constants of a module, without its docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    return {node.value for node in constants if isinstance(node.value, str)}


def attributes_of(path: Path) -> set[str]:
    """Names of the attributes that a module reads or sets."""
    return {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def names_of_vllm() -> set[str]:
    """Attributes and methods of vLLM's classes that the program uses, but for names that are of others, too."""
    table = {
        name
        for release in RELEASES.values()
        for entry in release.names
        if isinstance(entry, ClassNames)
        for name in (*entry.attributes, *entry.methods)
    }
    # Of tensors and of executors.
    own = {"device", "shutdown"}
    for file in OUTSIDE:
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    own |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
                    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                        own |= {target.attr} if target.value.id == "self" else set()
    return table - own


@pytest.mark.parametrize("file", OUTSIDE)
def test_only_the_adapter_names_vllm(file: str) -> None:
    path = PACKAGE / file
    assert "vllm" not in third_parties_of(path)
    assert {text for text in strings_of(path) if re.search(r"\bvllm\.[a-z_]+", text)} == set()
    # Nor its environment variables, which have a file of their own.
    named = {text for text in strings_of(path) if re.search(r"\bVLLM_[A-Z]", text)}
    assert bool(named) == (file == "engine_environment.py")


# Names under which files hold an engine of vLLM as it is.
HELD_ENGINES = {"llm", "_llm", "engine_client"}


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_engine_of_vllm_is_only_handed_on(file: str) -> None:
    """Outside of the adapter nothing is read of an object of vLLM's that is held there, whatever its name."""
    read = {
        ast.unparse(node)
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).removeprefix("self.") in HELD_ENGINES
    }
    assert read == set()


def test_only_the_adapter_reads_vllms_objects() -> None:
    names = names_of_vllm()
    assert {"routed_experts", "vllm_config", "input_batch", "_forward_entry", "e_score_correction_bias"} <= names
    read = {file: attributes_of(PACKAGE / file) & names for file in OUTSIDE}
    assert {file: found for file, found in read.items() if found} == {}


@pytest.mark.parametrize(
    ("stage", "banned"),
    [
        ("record", {"vllm", "transformers"}),
        ("statistics", {"vllm", "transformers", "torch"}),
        ("plan", {"vllm", "transformers", "torch"}),
        ("prune", {"vllm", "transformers", "torch"}),
    ],
)
def test_stages_name_no_library_that_is_too_heavy_for_them(stage: str, banned: set[str]) -> None:
    files = [file for file in FILES if file.startswith(f"{stage}/")]
    assert files
    found = {file: third_parties_of(PACKAGE / file) & banned for file in files if file not in EXCHANGE}
    assert {file: names for file, names in found.items() if names} == {}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stages_work_without_the_engine_side() -> None:
    """As if the folders were deleted: their imports fail."""
    code = """
import sys
sys.modules["reap_serve.adapter"] = sys.modules["reap_serve.record"] = None
import reap_serve.plan.planner, reap_serve.prune.run, reap_serve.prune.verify, reap_serve.compare.run
"""
    run_python(code)


@pytest.mark.parametrize(
    "modules",
    [
        "reap_serve.plan.planner, reap_serve.plan.sweep",
        "reap_serve.prune.run, reap_serve.prune.verify",
        "reap_serve.statistics.file, reap_serve.statistics.merge",
    ],
)
def test_laptop_stages_import_neither_torch_nor_vllm(modules: str) -> None:
    loaded = run_python(f"import sys, {modules}; print(' '.join(sys.modules))").split()
    assert not {"torch", "vllm", "transformers"} & set(loaded)


def test_every_command_is_offered_without_heavy_imports() -> None:
    code = """
import sys
from reap_serve.cli.app import _register
_register()
print(" ".join(sys.modules))
"""
    assert not {"torch", "vllm", "transformers", "numpy", "safetensors", "huggingface_hub"} & set(
        run_python(code).split()
    )
