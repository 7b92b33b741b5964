"""The wheel, an environment that has it installed, and processes that end with the test."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from service import FROM_WHEEL, Service

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the images install."""
    folder = tmp_path_factory.mktemp("dist")
    # No isolation: the build needs setuptools alone, and a test needs no network.
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    (found,) = folder.glob("reap_serve-*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment: the wheel is installed, its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = str(folder / "bin/python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    run = subprocess.run(command, env={**os.environ, **FROM_WHEEL}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))
    return folder / "bin"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    """Starts a process; all are stopped at the end of the module."""
    logs, running = tmp_path_factory.mktemp("logs"), list[Service]()

    def begin(name: str, command: Sequence[str], url: str, variables: Mapping[str, str] | None = None) -> Service:
        running.append(Service(command, url, logs / f"{name}.log", variables or {}))
        return running[-1]

    try:
        yield begin
    finally:
        for service in reversed(running):
            service.stop()
