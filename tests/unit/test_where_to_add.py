"""What a newcomer wants to add has one folder, whose README has the steps, and what the steps name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "reap_serve"
# The thing, its folder, and where its steps begin.
FOLDERS = {
    "a recorder": ("record", "A **recorder**: here."),
    "a sum": ("statistics", "A **sum**: one field and its formula."),
    "a criterion": ("statistics", "A **criterion**: one formula."),
    "release": ("adapter", "## How to add a release of vLLM"),
    "a mask": ("serve", "A **mask**, or what else changes or watches the routing: here."),
}


@pytest.mark.parametrize("thing", FOLDERS)
def test_documents_lead_to_the_steps(thing: str) -> None:
    folder, steps = FOLDERS[thing]
    for document in (REPOSITORY / "CONTRIBUTING.md", PACKAGE / "README.md"):
        row = next(line for line in document.read_text().splitlines() if line.startswith("| a") and thing in line)
        link = re.search(r"\(([\w/]+README\.md)\)", row)
        assert link is not None
        assert document.parent / link[1] == PACKAGE / folder / "README.md"
    _, _, found = (PACKAGE / folder / "README.md").read_text().partition(steps)
    assert found.lstrip().startswith("1. ")


def test_the_glossary_is_found() -> None:
    assert "\n## Words\n" in (PACKAGE / "record" / "README.md").read_text()
    for document in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", PACKAGE / "README.md"):
        assert "record/README.md#words" in document.read_text()


@pytest.mark.parametrize("folder", sorted({folder for folder, _ in FOLDERS.values()}))
def test_files_that_a_readme_names_exist(folder: str) -> None:
    readme = (PACKAGE / folder / "README.md").read_text()
    # NN is any release.
    named = {name for name in re.findall(r"`([\w./]+\.(?:py|md|toml))`", readme) if "NN" not in name}
    assert named
    places = (PACKAGE / folder, PACKAGE, REPOSITORY)
    tests = {path.name for path in (REPOSITORY / "tests").rglob("*.py")}
    assert {name for name in named - tests if not any((place / name).exists() for place in places)} == set()
