"""The wheel that the images install: built, looked into, and run from an environment of its own."""

from __future__ import annotations

import os
import subprocess
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from service import FROM_WHEEL

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "reap_serve"

pytestmark = [pytest.mark.slow]


def tracked(below: str) -> set[str]:
    """Files of a folder of the package that the repository holds."""
    command = ["git", "-C", str(ROOT), "ls-files", "--", f"reap_serve/{below}"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_it_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"reap_serve"}
    assert tracked("architectures/definitions") <= names
    assert tracked("demo/tiny_moe") <= names
    assert {name for name in tracked("") if name.endswith((".py", ".j2", "py.typed"))} <= names


def test_its_entry_points_exist(wheel: Path) -> None:
    content = zipfile.ZipFile(wheel)
    (name,) = [each for each in content.namelist() if each.endswith("entry_points.txt")]
    parser = ConfigParser()
    parser.read_string(content.read(name).decode())
    assert set(parser.sections()) == {"console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"}
    for group in parser.sections():
        for target in parser[group].values():
            module, _, attribute = target.partition(":")
            source = content.read(module.replace(".", "/") + ".py").decode()
            assert f"def {attribute}(" in source or f"class {attribute}" in source, target


def test_it_runs_from_a_clean_environment(wheel: Path, installed: Path, tmp_path: Path) -> None:
    """Dependencies are taken from this environment, the package from the wheel."""
    code = (
        "import reap_serve; from reap_serve.architectures.resolve import known_architectures;"
        "print(reap_serve.__file__, len(known_architectures()))"
    )
    file, count = answer(str(installed / "python"), "-c", code, cwd=tmp_path).split()
    assert file.startswith(str(installed.parent))
    assert int(count) == len(list((PACKAGE / "architectures/definitions").glob("*.json")))
    version = answer(str(installed / "reap-serve"), "--version", cwd=tmp_path)
    assert version.strip().endswith(wheel.name.split("-")[1])


def answer(*command: str, cwd: Path) -> str:
    """What a program of the new environment prints."""
    environment = {**os.environ, **FROM_WHEEL}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=cwd).stdout
