"""Plans from the statistics of an earlier release are those that it made itself.

`chosen/RELEASE.json` has the experts that RELEASE kept of `statistics/written/RELEASE.safetensors`, by the options of
`plan`; `written/RELEASE.json` is a whole plan of it.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from reap_serve.cli.app import main

HERE = Path(__file__).parent
RELEASES = sorted(path.stem for path in (HERE / "chosen").glob("*.json"))


def planned(release: str, options: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plan of today, as JSON."""
    stats = HERE.parent / "statistics" / "written" / f"{release}.safetensors"
    output = folder / "plan.json"
    arguments = ["plan", str(stats), *shlex.split(options), "--force", "--output", str(output), "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["reap-serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, options
    return json.loads(output.read_text())


def test_the_first_release_is_held_to() -> None:
    assert RELEASES[0] == "0.1.0"


@pytest.mark.parametrize("release", RELEASES)
def test_the_same_experts_stay(release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = json.loads((HERE / "chosen" / f"{release}.json").read_text())
    found = {}
    for options in chosen:
        layers = planned(release, options, tmp_path, monkeypatch)["layers"]
        found[options] = {str(layer["index"]): layer["kept"] for layer in layers}
    assert found == chosen


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """The texts and numbers of a document by their place."""
    if not isinstance(value, dict | list):
        return {place: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, inner in entries for name, leaf in leaves(inner, f"{place}/{key}").items()}


def parted(plan: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """A plan's fractional numbers, and all else."""
    found = leaves(plan)
    numbers = {name: leaf for name, leaf in found.items() if isinstance(leaf, float)}
    return numbers, {name: leaf for name, leaf in found.items() if name not in numbers}


@pytest.mark.parametrize("release", RELEASES)
def test_the_whole_plan_is_the_same(release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what made it, and for what later releases say besides; other processors change a number's last digits."""
    written = json.loads((HERE / "written" / f"{release}.json").read_text())
    found = planned(release, "--keep-experts 4", tmp_path, monkeypatch)
    for name in ("created", "tool", "python", "packages"):
        del written["provenance"][name]
    numbers, texts = parted(written)
    found_numbers, found_texts = parted(found)
    assert {name: found_numbers.get(name) for name in numbers} == pytest.approx(numbers, rel=1e-9)
    assert {name: found_texts.get(name) for name in texts} == texts
    assert [*found] == [*written], "the order of the keys"
