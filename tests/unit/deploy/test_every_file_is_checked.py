"""No file of deploy/ is only lying there: each is read by a test of this folder, and says what checks it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from known_metrics import DEPLOY

HERE = Path(__file__).parent
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
TOOLS = ("promtool", "hadolint", "docker compose config", "kubernetes-validate")
# JSON holds no comment, and the runbook's table is about all files: both stand in that table.
WITHOUT_COMMENT = {".json", ".md"}


def test_tests_of_this_folder_open_every_file(tmp_path: Path) -> None:
    """Runs them in a process of its own, which notes what is opened."""
    pytest.importorskip("vllm")
    opened = tmp_path / "opened"
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    variables = {"REAP_SERVE_WATCHED": str(DEPLOY), "REAP_SERVE_OPENED": str(opened), "PYTHONPATH": path}
    names = [str(path) for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "opened_files", "-p", "no:cacheprovider", *names]
    run = subprocess.run(
        command, env={**os.environ, **variables}, cwd=DEPLOY.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert set(opened.read_text().splitlines()) >= {str(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_its_head_names_what_checks_it(path: Path) -> None:
    if path.suffix in WITHOUT_COMMENT:
        named = (DEPLOY / "README.md").read_text()
        assert f"`{path.parent.name}/`" in named or path.name == "README.md"
        return
    head = "".join(path.read_text().splitlines(keepends=True)[:10])
    assert re.search(r"[Cc]hecked by:|Run by:", head)
    tests = re.findall(r"tests/[\w/]+\.py", head)
    assert all((DEPLOY.parent / test).is_file() for test in tests)
    assert tests or any(tool in head for tool in TOOLS)
