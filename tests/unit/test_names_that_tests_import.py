"""What slow tests and benches import from the program is there: they are not collected by the tests of every change."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("bench", "tests") for path in (ROOT / folder).rglob("*.py"))


@cache
def names_of(module: str) -> set[str]:
    """Names at the top of a module of the program, and the modules below it."""
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = {below.stem for below in path.iterdir()} if path.is_dir() else set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_they_are_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "reap_serve":
            assert node.module is not None
            missing = {alias.name for alias in node.names} - names_of(node.module)
            assert not missing, f"{node.module} has no {', '.join(sorted(missing))}"
