"""The shape of the package: data flows one way, and what needs no engine imports none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "reap_serve"

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
    "demo",
    "cli",
)
# To be parted: the adapter builds masks, and masks reach into layers.
ALLOWED = {
    ("adapter", "serve"),
    ("prune", "serve"),
}
BASE = {
    "architectures",
    "engine_environment",
    "errors",
    "leftovers",
    "model",
    "overwriting",
    "publish",
    "records",
    "shown_text",
    "slice_name",
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
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / stage).rglob("*.py")
        for name in imports_of(path) & later
        if (stage, name) not in ALLOWED
    }
    assert wrong == set()


def test_only_these_packages_name_vllm() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "vllm" for alias in node.names))
    }
    assert users <= {"adapter", "serve", "monitor", "compare"}


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
