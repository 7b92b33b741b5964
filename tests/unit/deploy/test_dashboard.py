"""The dashboard is generated, its queries read series that exist, and Grafana finds it."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest
import yaml
from known_metrics import DEPLOY, exposed, read_by, recorded

FOLDER = DEPLOY / "grafana"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", FOLDER / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    import sys

    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboard"] = module
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_code_gives(generator: ModuleType) -> None:
    assert json.loads((FOLDER / "reap-serve.json").read_text()) == generator.dashboard()


def test_every_query_reads_series_that_exist(generator: ModuleType) -> None:
    pytest.importorskip("vllm")
    known = exposed() | recorded()
    queries = [target["expr"] for panel in generator.dashboard()["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 15
    for query in queries:
        assert read_by(query)
        assert read_by(query) <= known, query


def test_panels_do_not_overlap(generator: ModuleType) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in generator.dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_identifiers_are_unique(generator: ModuleType) -> None:
    panels = generator.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_grafana_is_provisioned_with_it() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounts = dict(
        reversed(each.removesuffix(":ro").split(":"))
        for each in compose["services"]["grafana"]["volumes"]
        if each[0] == "."
    )
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/reap-serve.yml").read_text())["providers"]
    assert mounts[provider["options"]["path"] + "/reap-serve.json"] == "./grafana/reap-serve.json"
    assert mounts["/etc/grafana/provisioning"] == "./grafana/provisioning"
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    host = source["url"].removeprefix("http://").partition(":")[0]
    assert host in compose["services"]
