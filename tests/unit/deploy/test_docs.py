"""The documentation site: every page that is named is there, and every link between pages holds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from known_metrics import DEPLOY

FOLDER = DEPLOY / "docs"


@pytest.fixture(scope="module")
def gatherer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gather", FOLDER / "gather.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gather"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(gatherer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("pages")
    gatherer.gather(directory)
    return directory


def test_every_page_of_the_navigation_is_there_and_every_page_is_in_it(site: Path) -> None:
    named = set(re.findall(r"[\w./]+\.md", (FOLDER / "mkdocs.yml").read_text()))
    written = {str(path.relative_to(site)) for path in site.rglob("*.md")}
    assert named == written


def test_links_between_pages_hold(site: Path) -> None:
    links = 0
    for page in site.rglob("*.md"):
        for _, target in re.findall(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).is_file(), f"{page.relative_to(site)}: {target}"
                links += 1
    assert links > 20


def test_pictures_come_along(site: Path) -> None:
    for page in site.rglob("*.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.relative_to(site)}: {target}"


def test_the_commands_help_is_the_programs(site: Path) -> None:
    text = (site / "commands.md").read_text()
    for command in ("observe", "serve", "plan show", "stats drift", "tune", "cycle"):
        assert f"## reap-serve {command}\n" in text


def test_public_modules_can_be_imported(gatherer: ModuleType) -> None:
    for name in gatherer.PUBLIC:
        assert importlib.util.find_spec(name) is not None, name
