"""Plans and manifests that earlier releases wrote are read. Each file under `written` was written by the release of its
name: the plan from that release's statistics among the tests, the manifest from half of the embedded model by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reap_serve.demo.run import demo_files
from reap_serve.plan.record import read_plan
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.manifest import MANIFEST_NAME, read_manifest
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify

UNIT = Path(__file__).parents[1]
PLANS = sorted((UNIT / "plan" / "written").glob("*.json"))
MANIFESTS = sorted((UNIT / "prune" / "written").glob("*.json"))


def test_there_are_some_of_the_first_release() -> None:
    assert PLANS[0].name == MANIFESTS[0].name == "0.1.0.json"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan(path: Path) -> None:
    plan = read_plan(path)
    assert plan.provenance["tool"] == f"reap-serve {path.stem}"
    assert [(layer.index, len(layer.kept), len(layer.dropped)) for layer in plan.layers] == [(0, 4, 2), (1, 4, 2)]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_pruned_checkpoint_is_verified_by_its_manifest(path: Path, tmp_path: Path) -> None:
    """The plan in the manifest makes the same checkpoint today, and the source holds it sound."""
    model, out = demo_files().model, tmp_path / "out"
    shutil.copy(path, tmp_path / MANIFEST_NAME)
    manifest = read_manifest(tmp_path)
    assert manifest.provenance.tool == f"reap-serve {path.stem}"
    (tmp_path / "plan.json").write_text(manifest.plan.model_dump_json())
    prune(str(model), tmp_path / "plan.json", out, PruneOptions(MtpChoice.CUT, 1 << 30, 2), overwrite=False)
    shutil.copy(path, out / MANIFEST_NAME)
    report = verify(out, str(model), None)
    assert (report.sound, report.findings) == (True, ())
